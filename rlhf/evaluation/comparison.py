"""Compare a run's first and last evaluation, with intervals. The files in evals/ hold the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from rlhf.evaluation.statistics import Estimate
from rlhf.tracking.run_folder.atomic import read_object

if TYPE_CHECKING:
    from rich.table import Table


class WrittenSet(BaseModel):
    """The numbers of one evaluation set, as read from a file."""

    num_rows: int
    metrics: dict[str, Estimate]


class WrittenEvaluation(BaseModel):
    passing: str | None = None
    sets: dict[str, WrittenSet]


def read_evaluations(folder: Path) -> Iterator[tuple[int, WrittenEvaluation]]:
    """Yield the evaluations of a run by step, and of an evaluation stage as step 0.

    A file of another program, without numbers, is left out.
    """
    paths = {int(path.stem[5:]): path for path in folder.glob("evals/step_*.json") if path.stem[5:].isdecimal()}
    if (folder / "eval.json").exists():
        paths[0] = folder / "eval.json"
    for step, path in sorted(paths.items()):
        with suppress(ValidationError):
            yield step, WrittenEvaluation.model_validate(read_object(path) or {})


def comparison_rows(first: Mapping[str, WrittenSet], last: Mapping[str, WrittenSet]) -> Iterator[list[str]]:
    """Yield set, metric, first value, last value and change. Only the first row of a set names the set."""
    for name, results in last.items():
        earlier = first[name].metrics if name in first else {}
        for index, (metric, now) in enumerate(results.metrics.items()):
            before = earlier.get(metric)
            change = "" if before is None else f"{now.value - before.value:+.3g}"
            heading = f"{name} ({results.num_rows})" if index == 0 else ""
            yield [heading, metric, "-" if before is None else str(before), str(now), change]


def before_after(folder: Path) -> Table | None:
    """Return a table with one line per metric of each set. None: the run has fewer than two evaluations."""
    from rich.table import Table

    evaluations = list(read_evaluations(folder))
    if len(evaluations) < 2:
        return None
    (start, first), (end, last) = evaluations[0], evaluations[-1]
    table = Table(
        title=f"{folder.name}: evaluation, with 95 % intervals",
        caption=None if last.passing is None else f"A response passes with {last.passing}.",
    )
    for heading in ("set", "metric"):
        table.add_column(heading)
    for step in (start, end):
        table.add_column(f"step {step}", justify="right")
    for heading, *cells, _ in comparison_rows(first.sets, last.sets):
        if heading:
            table.add_section()
        table.add_row(heading, *cells)
    return table
