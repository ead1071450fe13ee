"""`rlhf quickstart`: train a tiny model on this machine, and report the improvement on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.commands.command import Command
from rlhf.commands.run import Run
from rlhf.commands.shared import print_table, starts_work, write_stdout
from rlhf.commands.train import train
from rlhf.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.table import Table

RECIPE_OF = {"ppo": "recipe:quickstart", "grpo": "recipe:quickstart_grpo"}
ACCURACY = "eval/heldout/score"
BEFORE = (0.2, 0.7)  # the warm start has learned the task only in part
AFTER = 0.85
CURVES = (ACCURACY, "rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean")
NUM_SAMPLES = 5
OUTSIDE_OF_TRAINING = ("run.", "cluster.", "tracking.")  # overrides of these sections leave the expected accuracy


@starts_work
def quickstart(algorithm: Literal["ppo", "grpo"] = "ppo", overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Train a tiny model on this machine in minutes, and show the improvement. Return the pipeline.

    An interrupted quickstart continues. RunError: the model has not reached the expected accuracy. A quickstart with
    changed settings, such as fewer steps, is measured without an expectation.

    Args:
        algorithm: the algorithm of the recipe.
    """
    from rlhf.config.files.load import load
    from rlhf.config.schema.stages import run_folder

    if algorithm not in RECIPE_OF:
        raise UserError(f"quickstart: got {algorithm!r}, expected {' or '.join(RECIPE_OF)}")
    recipe = RECIPE_OF[algorithm]
    loaded = load(recipe, overrides)
    outside = [text for text in overrides if text.strip().startswith(OUTSIDE_OF_TRAINING)]
    try:
        is_recipe = loaded.stages == load(recipe, outside).stages
    except UserError:  # these settings are valid only beside changes of the training
        is_recipe = False
    run = train(loaded, resume=True, quiet=quiet)
    show_improvement(run_folder(list(loaded.stages.values())[-1]), is_recipe=is_recipe)
    return run


def show_improvement(folder: Path, *, is_recipe: bool) -> None:
    """Print both evaluations, samples, and the path of the curves. RunError: the recipe misses its accuracy."""
    from rlhf.evaluation.comparison import before_after
    from rlhf.tracking.display.plots import plot_curves
    from rlhf.tracking.sinks.tracker import read_metrics

    rows = [row for row in read_metrics(folder) if row.get(ACCURACY) is not None]
    if len(rows) < 2:
        if is_recipe:
            raise RunError(f"quickstart: {folder / 'metrics.jsonl'} has no evaluation before and after training")
        write_stdout("the changed recipe has no evaluation before and after training\n")
        return
    print_table(before_after(folder))
    print_table(_samples(folder, rows[0]["step"], rows[-1]["step"]))
    write_stdout(f"plot: {plot_curves({folder.name: folder}, CURVES, output=folder / 'curves.png')}\n")
    start, end = rows[0][ACCURACY], rows[-1][ACCURACY]
    if not is_recipe:
        write_stdout(f"held-out accuracy {start:.2f} -> {end:.2f}, with other settings than the recipe's\n")
        return
    low, high = BEFORE
    if not low <= start <= high:
        raise RunError(f"quickstart: held-out accuracy after the warm start is {start:.2f}, expected {low} to {high}")
    if end < AFTER:
        raise RunError(f"quickstart: held-out accuracy after training is {end:.2f}, expected at least {AFTER}")
    write_stdout(f"held-out accuracy {start:.2f} -> {end:.2f}\n")


def _samples(folder: Path, first: int, last: int) -> Table:
    """Return some held-out prompts with both responses, corrected responses first."""
    from rich.table import Table
    from rich.text import Text

    from rlhf.tracking.formatting import number
    from rlhf.tracking.run_folder.atomic import read_lines
    from rlhf.tracking.run_folder.samples import samples_path

    before, after = (
        {row["prompt_id"]: row for row in read_lines(samples_path(folder, step)) if row["split"] == "heldout"}
        for step in (first, last)
    )
    shared = sorted(before.keys() & after.keys(), key=lambda i: (before[i]["score"] - after[i]["score"], i))
    table = Table(title="Samples (score in brackets)", title_justify="left", show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold")
    for i in shared[:NUM_SAMPLES]:
        responses = (f"{row['response']} [{number(row['score'])}]" for row in (before[i], after[i]))
        table.add_row(*map(Text, (before[i]["prompt"], *responses)))
    return table


COMMAND = Command(quickstart)
