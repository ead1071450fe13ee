"""`rlhf quickstart`: train a tiny model on this machine, and say whether it worked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, add_quiet
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers

RECIPE_OF = {"ppo": "quickstart.yaml", "grpo": "quickstart_grpo.yaml"}


def add(commands: Subparsers) -> None:
    command = commands.add_parser("quickstart", help="train a tiny model on this machine, in minutes")
    command.add_argument("--algorithm", choices=tuple(RECIPE_OF), default="ppo", help="which recipe")
    add_quiet(command)
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Train, show before and after."""
    quickstart(args.algorithm, args.overrides, quiet=args.quiet)
    return 0


def quickstart(algorithm: str, overrides: Sequence[str], *, quiet: bool) -> Path:
    """Train, show results before and after, and return the folder. An interrupted quickstart continues."""
    from rlhf.commands.train import launch
    from rlhf.config.files.load import load
    from rlhf.config.files.recipes import RECIPES
    from rlhf.config.schema.stages import run_folder
    from rlhf.quickstart_results import show

    if algorithm not in RECIPE_OF:
        raise UserError(f"quickstart: got {algorithm!r}, expected {' or '.join(RECIPE_OF)}")
    loaded = load(RECIPES / RECIPE_OF[algorithm], overrides)
    launch(loaded, resume=True, quiet=quiet)
    show(run_folder(list(loaded.stages.values())[-1]))
    return loaded.folder
