"""Collect the results of a sweep: a row per trial, the best trial, and the result files.

Everything is read from the journal and the run folders, so results can be written while the sweep runs.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.sweep import Sweep
from rlhf.config.yaml_tree import kind
from rlhf.sweeps.journal import Journal, State, Trial
from rlhf.sweeps.space import Values
from rlhf.tracking.formatting import duration, number
from rlhf.tracking.run_folder.atomic import read_lines, write_atomic, write_lines
from rlhf.tracking.sinks.tracker import read_metrics

MOST_OF_ERROR = 300  # characters
MOST_TIES = 8  # named trials


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    trial: str
    state: State
    parameters: Values
    value: float | None  # last value of the metric; None: there is no value
    best_value: float | None  # over the steps
    best_step: int | None
    step: int  # last recorded step
    time_s: float
    error: str | None

    def flat(self) -> dict[str, Any]:
        row = {"trial": self.trial, "state": self.state, **self.parameters}
        numbers = {key: getattr(self, key) for key in ("value", "best_value", "best_step", "step", "time_s")}
        return {**row, **numbers, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """The results of all trials in order, and the best trial."""

    folder: Path
    metric: str  # with its leading sign
    rows: tuple[TrialResult, ...]
    best: TrialResult | None  # None: no trial has a value; of equal values, the first trial

    @property
    def ties(self) -> tuple[TrialResult, ...]:
        """Return the other trials with the best value, only finished trials if the best is finished."""
        best = self.best
        if best is None:
            return ()
        rivals = [row for row in self.rows if (row.state == "finished") == (best.state == "finished")]
        return tuple(row for row in rivals if row.value == best.value and row != best)

    def describe_best(self) -> str:
        """Return the name of the best trial, with all tied trials."""
        names = [row.trial for row in self.ties]
        others = ", ".join(names[:MOST_TIES]) + (f" and {len(names) - MOST_TIES} more" if names[MOST_TIES:] else "")
        return ("none" if self.best is None else self.best.trial) + (f", in a tie with {others}" if names else "")

    def to_table(self) -> Table:
        """Return the trials for a terminal of 80 columns or more. The best trials are marked in front of the name."""
        keys = list(self.rows[0].parameters) if self.rows else []
        failures = [f"{row.trial} failed: {row.error}" for row in self.rows if row.error is not None]
        table = Table(title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
        table.title = f"{self.folder.name}: {len(self.rows)} trials by {self.metric}"
        table.caption = Text("\n".join(["* best, in a tie" if self.ties else "* best", *failures]))
        table.add_column("  trial", no_wrap=True)
        for heading in (*keys, self.metric.removeprefix("-"), "step", "time"):
            name = Text(re.sub(r"([./])", r"\1\n", heading))
            table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
        table.add_column("outcome", overflow="fold", vertical="bottom")
        for row in self.rows:
            is_best = row == self.best or row in self.ties
            numbers = ["-" if row.value is None else number(row.value), str(row.step), duration(row.time_s)]
            values = map(_format_value, row.parameters.values())
            cells = [f"{'*' if is_best else ' '} {row.trial}", *values, *numbers, row.state]
            table.add_row(*map(Text, cells), style="bold" if is_best else None)
        return table


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else kind(value) if not isinstance(value, dict) else json.dumps(value)


def collect(sweep: Sweep, journal: Journal) -> SweepResult:
    rows = tuple(_row(sweep, journal, trial) for _, trial in sorted(journal.trials.items()))
    sign = -1.0 if sweep.lower_is_better else 1.0
    done = [row for row in rows if row.state == "finished" and row.value is not None]
    done = done or [row for row in rows if row.state in ("stopped", "open") and row.value is not None]
    best = max(done, key=lambda row: sign * row.value, default=None)  # type: ignore[operator]
    return SweepResult(folder=sweep.folder, metric=sweep.config.metric, rows=rows, best=best)


def write(sweep: Sweep, result: SweepResult) -> None:
    rows = [row.flat() for row in result.rows]
    write_lines(result.folder / "results.jsonl", rows)
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(result.folder / "results.csv", text.getvalue())
    if (best := result.best) is not None:
        header = f"# {result.describe_best()}, of the sweep {sweep.folder}: "
        header += f"{sweep.metric} was {best.value:g} at step {best.step}.\n"
        write_atomic(result.folder / "best.yaml", header + dump_yaml(sweep.best(best.parameters)))


def judged_folder(sweep: Sweep, run: Path) -> Path:
    """Return the folder with the sweep's metric: the judged stage's folder in a pipeline, else the run folder."""
    return run / sweep.judged if sweep.base.is_pipeline else run


def metric_values(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) pairs of a run in rising order of steps. The list is empty before the first value."""
    return [(row["step"], row[metric]) for row in read_metrics(folder) if row.get(metric) is not None]


def _row(sweep: Sweep, journal: Journal, trial: Trial) -> TrialResult:
    folder = judged_folder(sweep, journal.run_folder(trial.number))
    rows, values = read_metrics(folder), metric_values(folder, sweep.metric)
    sign = -1.0 if sweep.lower_is_better else 1.0
    best_step, best_value = max(values, key=lambda item: sign * item[1], default=(None, None))
    return TrialResult(
        trial=trial.name,
        state=trial.state,
        parameters=trial.parameters,
        value=values[-1][1] if values else None,
        best_value=best_value,
        best_step=best_step,
        step=rows[-1]["step"] if rows else 0,
        time_s=rows[-1]["time_s"] if rows else 0.0,
        error=trial.error,
    )


def explain_failure(folder: Path, log: str, code: int) -> str:
    """Explain why a trial's process failed, with the exit code or signal.

    The explanation is the last error in the log, else the last error in errors.jsonl, else the last lines of the log.
    """
    _, marker, paragraph = log.rpartition("rlhf: error: ")
    if not marker:
        errors = read_lines(folder / "errors.jsonl")
        lines = [line for line in log.splitlines() if line.strip()]
        paragraph = errors[-1]["message"] if errors else " / ".join(lines[-3:])
    how = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    words = " ".join(paragraph.split())
    return f"{how}: {words[:MOST_OF_ERROR]}{'...' if len(words) > MOST_OF_ERROR else ''}" if words else how
