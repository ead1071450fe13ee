"""`rlhf doctor`: check the installation here, or whether the nodes of a cluster fit together, and give remedies."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from actors.doctor.results import CheckResult
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig


def add(commands: Subparsers) -> None:
    command = commands.add_parser("doctor", help="check the installation, and give a remedy for each problem")
    command.add_argument(
        "--cluster",
        metavar="CONFIG",
        nargs="?",
        const="",
        help="look at every node of a Ray cluster instead; with CONFIG at its paths and placement too",
    )
    command.add_argument(
        "--address", metavar="HOST:PORT", help="of the cluster; cluster.address or RAY_ADDRESS if not given"
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the findings. Return 1 if a finding makes training impossible, else 0."""
    if args.cluster is None:
        if args.address is not None:
            raise UserError("--address has no effect without --cluster")
        findings = doctor()
    else:
        from rlhf.config.files.load import load

        findings = cluster_doctor(load(args.cluster) if args.cluster else None, args.address)
    return int(any(finding.state == "bad" for finding in findings))


def doctor() -> tuple[CheckResult, ...]:
    """Return the findings for this machine."""
    from actors.doctor.machine import check_machine

    return check_machine()


def cluster_doctor(loaded: LoadedConfig | None, address: str | None) -> tuple[CheckResult, ...]:
    """Look at the nodes of a cluster."""
    from actors.doctor.cluster import check_cluster

    return check_cluster(loaded, address)
