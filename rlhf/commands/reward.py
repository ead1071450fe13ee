"""`rlhf reward CONFIG --file DATA`: score responses in a file with a configuration's rewards, without training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import AnyConfig, loaded_config, print_table, starts_work, write_stdout
from rlhf.errors import RunError

if TYPE_CHECKING:
    from rlhf.config.files.load import LoadedConfig
    from rlhf.evaluation.scored import ScoredFile

MOST_SHOWN = 10  # failures


@starts_work
def reward(config: AnyConfig, file: str | Path, overrides: Sequence[str] = ()) -> ScoredFile:
    """Score the responses in a file with a configuration's rewards, without training. The result holds the failures.

    Args:
        file (DATA): rows with `prompt`, `response` and the columns of the rewards, or samples written by a run.
    """
    return _score(loaded_config(config, overrides), Path(file))[0]


def _score(loaded: LoadedConfig, file: Path) -> tuple[ScoredFile, bool]:
    """Return the scores, and whether a failure would end a run."""
    from rlhf.rewards.failure_rule import ends_run
    from rlhf.rewards.scoring import rules_of_specs
    from rlhf.scoring.score_file import score_file
    from rlhf.scoring.scorer import scoring_of_config

    with loaded.located():
        scoring = scoring_of_config(loaded)
        scored, rules = score_file(scoring, file), rules_of_specs(scoring.specs)
    return scored, ends_run([error for _, error in scored.errors], rules, scoring.policy.on_error)


def _present(args: argparse.Namespace) -> None:
    """Print the table or the lines, then the failures. A failure is an error if the rewards' policy is to fail."""
    from rlhf.tracking.run_folder.atomic import json_line

    scored, fails = _score(loaded_config(args.config, args.overrides), Path(args.file))
    if args.json:
        write_stdout("".join(map(json_line, scored.to_json())))
    else:
        print_table(scored.to_table())
    if scored.errors:
        lines = "\n".join(
            f"{position}: {error.reward}: {error.kind}: {error.message}"
            for position, error in scored.errors[:MOST_SHOWN]
        )
        more = len(scored.errors) - MOST_SHOWN
        sys.stderr.write(lines + (f"\nand {more} more\n" if more > 0 else "\n"))
        if scored.num_unscored and fails:
            raise RunError(
                f"{scored.num_unscored} of {len(scored.rows)} rows have no score, and on_error of a "
                "failed reward is fail. "
                "Correct the reward, or set its on_error to drop or to a number."
            )


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row instead of a table")


COMMAND = Command(reward, _present, add=_add, changes={"file": {"flag": "--file", "required": True}})
