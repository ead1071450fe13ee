"""trackio as a tracker: `tracking.trackers: {trackio: {}}`, for `trackio show --project rlhf`. The module reads no run.

trackio writes to a data base below TRACKIO_DIR, or else below the cache folder of Hugging Face, and on request to a
Space of the hub. trackio gets the configuration, the metrics, histograms, tables and small images of samples, and
alerts.
"""

from __future__ import annotations

from typing import Any

from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.metrics.histograms import trimmed
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend
from rlhf.tracking.sinks.installed import TrackedRun
from rlhf.tracking.sinks.wandb_backend import shown_images, tables


class TrackioTracker(TrackerBackend):
    """Logs to a project of trackio. `space_id`: the Space of the Hugging Face hub that shows the project."""

    name = "trackio"

    def __init__(self, run: TrackedRun, *, project: str = "rlhf", space_id: str | None = None) -> None:
        import trackio
        import trackio.run
        import trackio.utils

        modules: tuple[Any, ...] = (trackio, trackio.run, trackio.utils)
        for module in modules:
            module.print = _ignore  # these modules write to stdout, where a program may read this run's progress
        self._image_of = run.image_of
        pipeline, _, stage = run.name.partition("/")
        self._run = trackio.init(
            project=project,
            name=run.name,
            group=pipeline if stage else None,
            space_id=space_id,
            config=dict(run.config),
            resume="never" if run.done_steps is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: TrackedStep) -> None:
        import trackio

        row: dict[str, Any] = {key: value for key, value in step.metrics.items() if value is not None}
        for key, histogram in step.histograms.items():
            form = trimmed(histogram)
            row[key] = trackio.Histogram(np_histogram=(form["counts"], form["edges"]))
        for split, (columns, data) in (shown := tables(step.samples())).items():
            row[f"samples/{split}"] = trackio.Table(columns=columns, data=data, allow_mixed_types=True)
        for split, images in shown_images(shown, self._image_of).items():
            row |= {f"images/{split}/{i}": trackio.Image(images[name], name) for i, name in enumerate(images, start=1)}
        self._run.log(row, step=step.step)

    def alert(self, severity: Severity, title: str, text: str) -> None:
        import trackio

        self._run.alert(title, text, trackio.AlertLevel.ERROR if severity == "failure" else trackio.AlertLevel.WARN)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


def _ignore(*_: object, **__: object) -> None: ...
