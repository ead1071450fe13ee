"""`rlhf doctor`: check the installation here, the nodes of a cluster, or the record of a run."""

from __future__ import annotations

import argparse
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, loaded_config, starts_work, write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from actors.doctor.check_results import CheckResult


@starts_work
def doctor(run: str | PathLike[str] | None = None) -> tuple[CheckResult, ...]:
    """Check the installation, or the record of a run. Print the findings and return them.

    A `bad` finding makes training impossible, or contradicts the rest of the record.

    Args:
        run (RUN): prove from this run folder that no prompt was lost or trained twice, no response exceeded
            rollouts.max_staleness, and each step and checkpoint is whole.
    """
    if run is not None:
        from actors.doctor.run_folder import check_run

        return check_run(Path(run))
    from actors.doctor.machine import check_machine

    return check_machine()


@starts_work
def cluster_doctor(config: AnyConfig | None = None, *, address: str | None = None) -> tuple[CheckResult, ...]:
    """Check whether the nodes of a Ray cluster fit together, print the findings and return them.

    A configuration adds checks of paths and placement. `address` is HOST:PORT of the cluster; the default is
    cluster.address, then RAY_ADDRESS.
    """
    from actors.doctor.cluster import check_cluster

    return check_cluster(None if config is None else loaded_config(config), address)


def tested_versions() -> str:
    """Return the exact versions with which the tests passed, as constraints for `pip install -c`."""
    return (Path(__file__).parents[1] / "tested_versions.txt").read_text(encoding="utf-8")


def _add(parser: argparse.ArgumentParser) -> None:
    text = "check every node of a Ray cluster instead, and with CONFIG its paths and placement too"
    parser.add_argument("--cluster", metavar="CONFIG", nargs="?", const="", help=text)
    text = "print the tested versions of all packages instead, as constraints for `pip install -c FILE`"
    parser.add_argument("--versions", action="store_true", help=text)
    text = "the address of the cluster; cluster.address or RAY_ADDRESS if not given"
    parser.add_argument("--address", metavar="HOST:PORT", help=text)


def _present(args: argparse.Namespace) -> int:
    if args.versions:
        if args.run is not None or args.cluster is not None or args.address is not None:
            raise UserError(
                "--versions only prints the tested versions, so RUN, --cluster and --address have no effect with it. "
                "Remove them."
            )
        write_stdout(tested_versions())
        return 0
    if args.run is not None and args.cluster is not None:
        raise UserError("--cluster: RUN and --cluster are two checks. Give one of them.")
    if args.cluster is None:
        if args.address is not None:
            raise UserError("--address has no effect without --cluster")
        findings = doctor(args.run)
    else:
        findings = cluster_doctor(args.cluster or None, address=args.address)
    return int(any(finding.state == "bad" for finding in findings))


COMMAND = Command(doctor, _present, add=_add)
