"""`rlhf plan CONFIG`: check a configuration and show what follows from it. Starts nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


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
    from rlhf.config.load import load
    from rlhf.planning import scenarios
    from rlhf.planning.report import render

    loaded = load(args.config, args.overrides)
    settings = {"cluster": args.cluster, "shapes": args.shapes, "lengths": args.lengths}
    if args.simulate is None:
        say(render(loaded, **settings))
    else:
        say(scenarios.render(loaded, args.simulate, **settings))
    return 0
