"""SwanLab as a tracker: `tracking.trackers: {swanlab: {}}`. The module reads no run.

SwanLab gets the configuration, the metrics, tables and small images of samples, and alerts as text. SwanLab has no
histograms. The command line, the repository and the terminal output are not sent, because all three may hold secrets.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend
from rlhf.tracking.sinks.installed import TrackedRun
from rlhf.tracking.sinks.wandb_backend import shown_images, tables


class SwanlabTracker(TrackerBackend):
    """Logs to a project of SwanLab. `offline`: files in the run's folder, for `swanlab sync`. `online` needs
    SWANLAB_API_KEY or `swanlab login`, and may name the workspace of a team."""

    name = "SwanLab"

    def __init__(
        self,
        run: TrackedRun,
        *,
        project: str = "rlhf",
        mode: Literal["offline", "online"] = "offline",
        workspace: str | None = None,
    ) -> None:
        import swanlab
        from swanlab.sdk.internal.pkg import console

        console.c.quiet = True  # SwanLab writes to stdout, where a program may read this run's progress
        id_path = run.folder / "swanlab_run_id"
        if run.done_steps is None or not id_path.exists():
            write_atomic(id_path, uuid.uuid4().hex)
        pipeline, _, stage = run.name.partition("/")
        nothing = {"hardware": False, "runtime": False, "requirements": False, "git": False, "monitor": False}
        self._step, self._image_of = 0, run.image_of
        self._run = swanlab.init(
            mode=mode,
            log_dir=str(run.folder / "swanlab"),
            project=project,
            workspace=workspace,
            name=run.name,
            group=pipeline if stage else None,
            id=id_path.read_text(encoding="utf-8"),
            resume="allow" if mode == "online" else None,  # offline, there is no server with the id
            config=dict(run.config),
            settings=swanlab.Settings.model_validate(
                {"interactive": False, "terminal": {"proxy_type": "none"}, "probe": nothing}
            ),
        )

    def log(self, step: TrackedStep) -> None:
        import swanlab

        self._step = step.step
        row: dict[str, Any] = {key: value for key, value in step.metrics.items() if value is not None}
        for split, (columns, data) in (shown := tables(step.samples())).items():
            table = swanlab.echarts.Table()
            table.add(columns, data)
            row[f"samples/{split}"] = table
        for split, images in shown_images(shown, self._image_of).items():
            row[f"images/{split}"] = [swanlab.Image(image, caption=name) for name, image in images.items()]
        self._run.log(row, step=step.step)

    def alert(self, severity: Severity, title: str, text: str) -> None:
        import swanlab

        self._run.log({f"alerts/{title}": swanlab.Text(f"{severity}: {text}")}, step=self._step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(state="crashed" if failed else "success", error="the run failed" if failed else None)
