"""`rlhf plan CONFIG`: check a configuration and show what follows from it. Starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.load import LoadedConfig


def add(commands: Subparsers) -> None:
    """Its arguments."""
    command = commands.add_parser("plan", help="check a configuration and show what follows from it")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("--cluster", metavar="NODES", help="fit it into nodes such as '2*cpu=96,gpu=8,type=h100'")
    command.add_argument(
        "--shapes", metavar="FOLDER", type=Path, help="where config.json of models that are not here lie"
    )
    command.add_argument(
        "--lengths", metavar="SPEC", help="of responses: lognormal:MEAN:SIGMA, a file, or a run's folder"
    )
    command.add_argument(
        "--simulate", metavar="SPEC", help="predict how busy GPUs are, such as 'gpus=64+4096,staleness=0+1,mtbf_h=5000'"
    )
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    settings = {"cluster": args.cluster, "shapes": args.shapes, "lengths": args.lengths}
    say(plan(args.config, args.overrides, simulate=args.simulate, **settings))
    return 0


def plan(
    config: str | Path | LoadedConfig,
    overrides: Sequence[str],
    *,
    cluster: str | None,
    shapes: Path | None,
    lengths: str | None,
    simulate: str | None,
) -> str:
    """The text, of a run or of a file for `rlhf sweep`."""
    from rlhf.config.load import load
    from rlhf.config.yaml_tree import read_tree

    if isinstance(config, str | Path):
        if "sweep" in read_tree(Path(config)).values:
            from rlhf.config.sweep import load_sweep
            from rlhf.planning.trials import render_sweep

            if simulate is not None:
                raise UserError("--simulate is of one run; give the file that the sweep varies")
            sweep = load_sweep(config, overrides)
            return render_sweep(sweep, cluster=cluster, shapes=shapes, lengths=lengths)
        config = load(config, overrides)
    if simulate is not None:
        from rlhf.planning import scenarios

        return scenarios.render(config, simulate, cluster=cluster, shapes=shapes, lengths=lengths)
    from rlhf.planning.report import render

    return render(config, cluster=cluster, shapes=shapes, lengths=lengths)
