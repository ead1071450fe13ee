"""`rlhf reward CONFIG --file DATA`: a configuration's rewards over responses in a file, without training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.shared import add_overrides, say
from rlhf.errors import RunError

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.config.files.load import LoadedConfig
    from rlhf.evaluation.scored import ScoredFile

MOST_SHOWN = 10  # failures


def add(commands: Subparsers) -> None:
    command = commands.add_parser("reward", help="a configuration's rewards over responses in a file, without training")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--file",
        type=Path,
        metavar="DATA",
        required=True,
        help="rows with prompt, response and columns, or a run's samples",
    )
    command.add_argument("--json", action="store_true", help="print a line for each row, not a table")
    add_overrides(command)


def run(args: argparse.Namespace) -> int:
    """Print the table or the lines, then the failures. A failure is an error if the rewards' policy is to fail."""
    from rlhf.config.files.load import load
    from rlhf.tracking.run_folder.atomic import json_line

    scored, fails = reward(load(args.config, args.overrides), args.file)
    if args.json:
        say("".join(map(json_line, scored.to_json())))
    else:
        from rich.console import Console

        Console().print(scored.to_table())
    if scored.errors:
        lines = "\n".join(
            f"{position}: {error.reward}: {error.kind}: {error.message}"
            for position, error in scored.errors[:MOST_SHOWN]
        )
        more = len(scored.errors) - MOST_SHOWN
        sys.stderr.write(lines + (f"\nand {more} more\n" if more > 0 else "\n"))
        if scored.num_unscored and fails:
            raise RunError(f"{scored.num_unscored} of {len(scored.rows)} rows have no score, and on_error is fail")
    return 0


def reward(loaded: LoadedConfig, file: Path) -> tuple[ScoredFile, bool]:
    """Score the responses in a file. Also return whether a failure among them would end a run."""
    from rlhf.rewards.failure_rule import ends_run
    from rlhf.rewards.scoring import error_rules
    from rlhf.scoring.score_file import score_file
    from rlhf.scoring.scorer import scoring_of_config

    with loaded.located():
        scoring = scoring_of_config(loaded)
        scored, rules = score_file(scoring, file), error_rules(scoring.specs)
    return scored, ends_run([error for _, error in scored.errors], rules, scoring.policy.on_error)
