"""MLflow as a tracker: `tracking.trackers: {mlflow: {}}`. The module reads no run.

MLflow gets the configuration as parameters, the metrics of each step, tables of samples, small images of samples,
alerts, the timeline and, on request, the checkpoints. MLflow has no histograms.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend
from rlhf.tracking.sinks.installed import TrackedRun
from rlhf.tracking.sinks.wandb_backend import shown_images, tables

MOST_PARAMS = 100  # of one request; MLflow refuses more
MOST_METRICS = 1000
MOST_CHARS = 6000  # of a parameter's value


class MlflowTracker(TrackerBackend):
    """Logs to the MLflow server or data base at `uri`, under an experiment. uri None: MLFLOW_TRACKING_URI, or else
    MLflow's own default, a data base in the current folder. `checkpoints` stores checkpoints and the final model."""

    name = "MLflow"

    def __init__(
        self, run: TrackedRun, *, uri: str | None = None, experiment: str = "rlhf", checkpoints: bool = False
    ) -> None:
        from mlflow import MlflowClient

        self._folder, self._checkpoints, self._image_of = run.folder, checkpoints, run.image_of
        self._client = MlflowClient(uri)
        id_path = run.folder / "mlflow_run_id"
        if run.done_steps is not None and id_path.exists():
            self._id = id_path.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        group = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        self._id = self._client.create_run(group, run_name=run.name).info.run_id
        write_atomic(id_path, self._id)
        self._log_params(run.config)

    def _log_params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_allowed(key), str(value)[:MOST_CHARS]) for key, value in _leaves(config)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])

    def log(self, step: TrackedStep) -> None:
        """Log the metrics, and a table of the samples of each split as a JSON file."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {key: value for key, value in step.metrics.items() if value is not None}
        rows = [Metric(_allowed(key), value, now, step.step) for key, value in values.items()]
        for first in range(0, len(rows), MOST_METRICS):
            self._client.log_batch(self._id, metrics=rows[first : first + MOST_METRICS])
        for split, (columns, data) in (shown := tables(step.samples())).items():
            table = {"columns": columns, "data": data}
            self._client.log_dict(self._id, table, f"samples/{split}/step_{step.step:06d}.json")
        for images in shown_images(shown, self._image_of).values():
            for name, image in images.items():
                self._client.log_image(self._id, image, artifact_file=f"images/{name}.png")

    def alert(self, severity: Severity, title: str, text: str) -> None:
        self._client.set_tag(self._id, f"alert.{title}", f"{severity}: {text}"[:MOST_CHARS])

    def checkpoint(self, step: int, folder: Path) -> None:
        if self._checkpoints:
            self._client.log_artifacts(self._id, str(folder), f"checkpoints/step_{step:06d}")

    def close(self, *, failed: bool) -> None:
        timeline, final = self._folder / "timeline.json", self._folder / "final"
        if timeline.exists():
            self._client.log_artifact(self._id, str(timeline))
        if self._checkpoints and final.exists():
            self._client.log_artifacts(self._id, str(final), "final")
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _allowed(name: str) -> str:
    """Replace the characters that MLflow refuses in names, as in `eval/heldout/pass@1`."""
    return re.sub(r"[^\w.:/ -]", "_", name)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
