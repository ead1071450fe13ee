"""`rlhf plan CONFIG`: check a configuration and show what follows from it. Starts nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    """Its arguments."""
    command = commands.add_parser("plan", help="check a configuration and show what follows from it")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("--cluster", metavar="NODES", help="fit it into nodes such as '2*cpu=96,gpu=8+1*cpu=16'")
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from rlhf.config.load import load
    from rlhf.config.plan import render

    say(render(load(args.config, args.overrides), cluster=args.cluster))
    return 0
