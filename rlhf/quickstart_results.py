"""The final output of the quickstart: held-out accuracy before and after, samples, curves, and a verdict.

It reads the run folder and trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import RunError
from rlhf.tracking.display.plots import SamplePair, before_after_table, plot_curves
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.tracking.sinks.tracker import read_metrics

ACCURACY = "eval/heldout/score"
BEFORE = (0.2, 0.7)  # the warm start has learned the task only in part
AFTER = 0.85
CURVES = (ACCURACY, "rewards/score/mean", "experience/kl_ref/mean", "update/entropy/mean")
NUM_SAMPLES = 5


def show(folder: Path) -> None:
    """Print the table and the plot's path. RunError: the held-out accuracy is below the expected one."""
    from rich.console import Console

    rows = [row for row in read_metrics(folder) if row.get(ACCURACY) is not None]
    if len(rows) < 2:
        raise RunError(f"quickstart: {folder / 'metrics.jsonl'} has no evaluation before and after training")
    before, after = rows[0], rows[-1]
    pairs = _pairs(folder, before["step"], after["step"])
    console = Console()
    console.print(before_after_table(_evaluation(before), _evaluation(after), pairs))
    console.print(
        f"plot: {plot_curves({folder.name: folder}, CURVES, output=folder / 'curves.png')}",
        highlight=False,
        soft_wrap=True,
    )
    start, end = before[ACCURACY], after[ACCURACY]
    if not BEFORE[0] <= start <= BEFORE[1]:
        raise RunError(
            f"quickstart: held-out accuracy after the warm start is {start:.2f}, expected {BEFORE[0]} to {BEFORE[1]}"
        )
    if end < AFTER:
        raise RunError(f"quickstart: held-out accuracy after training is {end:.2f}, expected at least {AFTER}")
    console.print(f"held-out accuracy {start:.2f} -> {end:.2f}", highlight=False)


def _evaluation(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("eval/") and value is not None}


def _pairs(folder: Path, first: int, last: int) -> list[SamplePair]:
    """Return some held-out prompts with both responses, corrected ones first."""
    before, after = (
        {row["prompt_id"]: row for row in read_lines(samples_path(folder, step)) if row["split"] == "heldout"}
        for step in (first, last)
    )
    shared = sorted(before.keys() & after.keys(), key=lambda i: (before[i]["score"] - after[i]["score"], i))
    return [
        SamplePair(
            prompt=before[i]["prompt"],
            before=before[i]["response"],
            before_score=before[i]["score"],
            after=after[i]["response"],
            after_score=after[i]["score"],
        )
        for i in shared[:NUM_SAMPLES]
    ]
