"""`rlhf dashboard`: a W&B workspace with the graphs of a run in the order in which one reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers


def add(commands: Subparsers) -> None:
    command = commands.add_parser("dashboard", help="make a W&B workspace for the runs of a project")
    command.add_argument("--project", default="rlhf", help="W&B project (tracking.wandb_project); rlhf")
    command.add_argument("--entity", help="W&B user or team; the account's own")
    command.add_argument("--out", type=Path, metavar="FILE", help="write it as JSON, and ask no server")


def run(args: argparse.Namespace) -> int:
    """Save it, or write it down; say where."""
    from rlhf.tracking.sinks.wandb_workspace import publish

    say(f"{publish(project=args.project, entity=args.entity, out=args.out)}\n")
    return 0
