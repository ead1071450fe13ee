"""A run as an object: the files of the run's folder as tables, curves, a report and a diagnosis.

`rlhf.train` returns this object. Nothing is read before the first use, and each use reads the files again, so the
object of a running run shows the present state. The object never changes a run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    from PIL.Image import Image

    from rlhf.tracking.diagnosis.findings import Findings
    from rlhf.tracking.display.plots import Curves
    from rlhf.viewing.report import Report
    from rlhf.viewing.runs import RunPlace
    from rlhf.viewing.summary import MetricsSoFar

# of the columns of samples
_FIRST = ("split", "prompt", "images", "response", "columns", "score", "scores", "advantage", "truncated")


@dataclass(frozen=True, repr=False)
class Run(os.PathLike[str]):
    """A run or a pipeline in a folder. Wherever a call takes the path of a run or of a model, it takes this object.

    UserError: the folder holds no run. A property that needs a single run refuses a pipeline, and names `stages`.
    """

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from rlhf.viewing.runs import RunPlaces

        object.__setattr__(self, "folder", Path(folder))
        RunPlaces([self.folder])

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        """Return the state, the numbers to read first and the problems of each run, in words."""
        from rlhf.viewing.summary import overview

        texts = [overview(place, _summary(place)) for place in self._places()]
        return "\n\n".join([f"pipeline {self.folder}", *texts] if self.stages else texts)

    @property
    def stages(self) -> dict[str, Run]:
        """Return the runs of a pipeline by the names of the stages, in the order of their start."""
        return {place.stage: Run(self.folder / place.stage) for place in self._places() if place.stage}

    @property
    def state(self) -> str:
        """Return finished, running, failed, stopped or not started."""
        return self._place().word()

    @property
    def metrics(self) -> pandas.DataFrame:
        """Return all metrics: a row per step (the index), a column per metric. NaN: the step has no such value."""
        import pandas

        from rlhf.viewing.report import metric_rows

        rows = metric_rows(self._place().path)
        return pandas.DataFrame(rows, columns=None if rows else ["step", "time_s"]).set_index("step")

    @property
    def samples(self) -> pandas.DataFrame:
        """Return all stored responses, indexed by step and row, without their tokens, which `tokens` returns.

        `scores/NAME` is the score of a reward, and `columns/NAME` a column of the data row. A column without a value in
        any row is left out.
        """
        import pandas

        parts = {step: pandas.DataFrame(map(_flat, self._rows(step))) for step in self._steps()}
        return (
            pandas.concat(parts, names=["step", "row"]).dropna(axis="columns", how="all")
            if parts
            else pandas.DataFrame()
        )

    def tokens(self, step: int, row: int = 0) -> pandas.DataFrame:
        """Return a response token by token: text, id, whether sampled, log-probabilities, advantage.

        Args:
            step: the step of the response.
            row: the row of the response in `samples` at this step.
        """
        import pandas

        steps = self._steps()
        if step not in steps:
            stored = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder} has no samples of step {step}. Steps with samples: {stored}.")
        rows = self._rows(step)
        if not 0 <= row < len(rows):
            raise UserError(f"{self.folder} has {len(rows)} samples of step {step}, but row is {row}.")
        columns = rows[row].get("tokens") or {}
        table = pandas.DataFrame({name: column for name, column in columns.items() if name != "sequences" and column})
        return table.astype({"ids": "Int64"}) if None in (columns.get("ids") or ()) else table  # no id: of an image

    def image(self, name: str) -> Image:
        """Return an image of a prompt or a turn in RGB, by its name in column `images` of `samples`.

        UserError: `name` is not the name of an image. RunError: the folder lacks the image, or the file was changed.
        """
        from rlhf.tracking.run_folder.folder import images_folder
        from rlhf.vision.thumbnails import whole_image

        return whole_image(images_folder(self._place().path), name)

    @property
    def evaluations(self) -> pandas.DataFrame:
        """Return every metric of every evaluation with its 95 % interval: step, set, metric, value, low, high, rows."""
        import pandas

        from rlhf.evaluation.comparison import read_evaluations

        rows = [
            (step, name, metric, estimate.value, estimate.low, estimate.high, results.num_rows)
            for step, written in read_evaluations(self._place().path)
            for name, results in written.sets.items()
            for metric, estimate in results.metrics.items()
        ]
        return pandas.DataFrame(rows, columns=["step", "set", "metric", "value", "low", "high", "rows"])

    @property
    def diagnosis(self) -> Findings:
        """Return the problems that the run showed, the worst first. A problem has the symptom, the reason and the
        advice.
        """
        return _summary(self._place()).findings()

    def plot(self, *metrics: str, against: Run | Sequence[Run] = ()) -> Curves:
        """Draw the curves of metrics, or of those to read first. The result is a figure of matplotlib.

        Args:
            metrics: the names of metrics, as in the columns of `metrics`.
            against: other runs to draw in the same panels.
        """
        from rlhf.config.mistakes.suggestions import nearest
        from rlhf.tracking.display.plots import draw_curves
        from rlhf.viewing.report import shown_metrics
        from rlhf.viewing.runs import short_names

        runs = [self, *([against] if isinstance(against, Run) else against)]
        paths = list(dict.fromkeys(run._place().path for run in runs))
        summaries = [_summary(run._place()) for run in runs]
        known = [key for summary in summaries for key in summary.columns]
        for metric in metrics:
            if metric not in known:
                near = nearest(metric, known)
                hint = f"did you mean {near}?" if near else "The columns of `metrics` are the names."
                raise UserError(f"{self.folder} has no value of the metric {metric!r}; {hint}")
        return draw_curves(dict(zip(short_names(paths), paths, strict=True)), metrics or shown_metrics(summaries))

    @property
    def model(self) -> Path:
        """Return the folder of the trained model, for `policy.model` of a next run. UserError: there is no model."""
        folder = self._place().path / "final"
        if not folder.is_dir():
            raise UserError(f"{self.folder} has no model in final/: the run is {self.state}.")
        return self.folder / "final"

    def report(self, out: Path | None = None) -> Report:
        """Write the run or the pipeline as one HTML page, as `rlhf.report` does. A notebook shows the page."""
        from rlhf.viewing.report import write_report

        return write_report([self.folder], out)

    def _places(self) -> list[RunPlace]:
        from rlhf.viewing.runs import RunPlaces

        return list(RunPlaces([self.folder]).by_name().values())

    def _place(self) -> RunPlace:
        places = self._places()
        if places[0].stage:
            names = ", ".join(place.stage for place in places)
            text = f"{self.folder} is a pipeline of the stages {names}."
            raise UserError(f"{text} Take one of them, such as `run.stages[{places[-1].stage!r}]`.")
        return places[0]

    def _steps(self) -> list[int]:
        return self._place().sample_steps()

    def _rows(self, step: int) -> list[dict[str, Any]]:
        from rlhf.tracking.run_folder.atomic import read_lines
        from rlhf.tracking.run_folder.samples import samples_path

        try:
            return read_lines(samples_path(self.folder, step))
        except ValueError as error:
            raise UserError(
                f"{error}. Correct or remove this line, so that the remaining lines can be shown."
            ) from error


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample as cells of a table, without tokens: first what a reader looks at first. None: empty."""
    cells: dict[str, Any] = {}
    for name in dict.fromkeys([*(name for name in _FIRST if name in row), *row]):
        if name in ("columns", "scores"):
            cells |= {f"{name}/{key}": value for key, value in (row[name] or {}).items()}
        elif name != "tokens":
            cells[name] = None if row[name] in ([], {}) else row[name]
    return cells


def _summary(place: RunPlace) -> MetricsSoFar:
    from rlhf.viewing.report import metric_rows
    from rlhf.viewing.summary import MetricsSoFar

    return MetricsSoFar(metric_rows(place.path))
