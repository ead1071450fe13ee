"""`rlhf merge CONFIG`: merge models or adapters into one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, add_quiet, say

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.schema.merge import MergeRun


def add(commands: Subparsers) -> None:
    command = commands.add_parser("merge", help="merge models or adapters into one")
    command.add_argument("config", metavar="CONFIG", help="YAML file with a merge section")
    add_quiet(command)
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    from rlhf.config.schema.merge import load_merge

    merging = load_merge(args.config, args.overrides)
    merge(merging, quiet=args.quiet)
    say(f"done: {merging.out}\n")
    return 0


def merge(config: MergeRun, *, quiet: bool) -> None:
    """Merge models or adapters into the folder of the section `merge`."""
    from rlhf.merging.merge import merge_models

    merge_models(config, config.out, quiet=quiet)
