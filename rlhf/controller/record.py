"""Record a run for both loops: stage times, the step's row, checkpoints, and the best checkpoint."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.schema.train import EarlyStopping, TrainConfig
from rlhf.controller.callback_calls import CallbackCalls
from rlhf.errors import RunError, StorageFull, UserError, WorkerLost
from rlhf.process.disk_full import PAUSE, Shortage
from rlhf.role_table import ROLE_OF_STAGE, Role
from rlhf.roles import Metrics, NodesRole
from rlhf.tracking.display.progress import Progress
from rlhf.tracking.logs import redact, set_step
from rlhf.tracking.metrics.declarations import histograms, merge_metrics, results
from rlhf.tracking.metrics.reductions import Max, Reduction, Sum
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.group_ledger import StepGroups
from rlhf.tracking.run_folder.mirror import Mirror
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.types import MemoryReport
from rlhf.vision.store import PassingImages

logger = logging.getLogger(__name__)
STATE_FILE = "controller.json"
_APART: ContextVar[list[Metrics] | None] = ContextVar("metrics of another step than the current one", default=None)
_IS_SHOWN: ContextVar[bool] = ContextVar("whether the progress display shows the stage", default=True)


@dataclass(slots=True)
class RunRecord:
    """The run folder and all views, with the metrics of the current step."""

    folder: RunFolder
    tracker: Tracker
    timeline: Timeline
    progress: Progress
    nodes: NodesRole | None = None  # None: nodes are not measured
    mirror: Mirror | None = None  # None: the folder has no mirror
    callbacks: CallbackCalls = field(default_factory=CallbackCalls)
    step: int = 0  # the last logged step
    parts: list[Metrics] = field(default_factory=list)
    images: PassingImages | None = None  # images of conversations; None: all images are kept
    groups: StepGroups | None = None  # groups of the current step; None: no rollouts

    def begin_step(self, step: int) -> None:
        """Clear the last step's metrics. Step 0 is the evaluation before training."""
        set_step(step)
        self.progress.begin(step)
        self.parts = []
        self.groups = None
        if self.images is not None:
            self.images.begin_step()

    def add(self, metrics: Metrics) -> None:
        """Add metrics to the current step, or in a block of `apart` to that block's list."""
        apart = _APART.get()
        (self.parts if apart is None else apart).append(metrics)

    @contextmanager
    def apart(self, parts: list[Metrics], *, is_shown: bool = False) -> Generator[None]:
        """Collect the metrics of the block, and of tasks created there, in the given list. `is_shown`: whether the
        display of the current step shows the stages of the block."""
        tokens = _APART.set(parts), _IS_SHOWN.set(is_shown)
        try:
            yield
        finally:
            _APART.reset(tokens[0])
            _IS_SHOWN.reset(tokens[1])

    def show(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Show the current stage and the progress, except for work for a later step."""
        if _IS_SHOWN.get():
            self.progress.stage(stage, done, total)

    @contextmanager
    def stage(self, name: str, *, role: Role | None = None) -> Generator[None]:
        """Time a stage: `time/<name>_s`, the timeline, the progress display. The stage's name determines the role."""
        self.show(name)
        began = time.perf_counter()
        with self.timeline.span(name, role or ROLE_OF_STAGE.get(name) or "controller"):
            yield
        self.add({f"time/{name}_s": Sum(total=time.perf_counter() - began)})

    def memory(self, role: str, report: MemoryReport) -> None:
        peaks: dict[str, Reduction] = {f"memory/{role}_rss_gib": Max(value=report.rss_gib)}
        if report.gpu_gib is not None:
            peaks[f"memory/{role}_gpu_gib"] = Max(value=report.gpu_gib)
        self.add(peaks)

    async def system(self) -> None:
        if self.nodes is not None:
            self.add(await self.nodes.use())

    def row(self) -> dict[str, float]:
        return results(merge_metrics(self.parts))

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        """Log the step. RunError, with nothing stored: the loss is not finite, or a later start has the folder."""
        if self.folder.is_taken_over():
            raise RunError(
                f"{self.folder.path}: a later start of the run uses this folder, so this process ends after step "
                f"{self.step}. Only a single process may use the folder, and the file system has dropped the lock of "
                "this process."
            )
        loss = row.get("update/loss/mean", 0.0)
        if not math.isfinite(loss):
            raise RunError(
                f"update: the loss of step {step} is {loss}. No checkpoint of this step was written. Lower train.lr, "
                "or look at the samples and the metrics of the last steps."
            )
        findings = self.tracker.log(step, row, histograms(merge_metrics(self.parts)), self.groups)
        self.step = step
        self.progress.step(step, row)
        for finding in findings:
            self.progress.finding(finding)

    @contextmanager
    def pauses(self) -> Generator[None]:
        """Record the waits for room in the block: an alert, a line in errors.jsonl, and a span in the timeline."""
        unwritten: list[ErrorRecord] = []

        def note(record: ErrorRecord) -> None:
            try:
                self.tracker.log_error(record, waits=False)
            except StorageFull:  # errors.jsonl may be on the full disk
                unwritten.append(record)

        def began(shortage: Shortage) -> None:
            note(ErrorRecord(step=self.step + 1, stage="room", kind="full", message=str(shortage)))
            self.tracker.alert("warning", "no room", f"Step {self.step + 1}: {shortage} The run waits for room.")

        def ended(seconds: float) -> None:
            now, late = time.time(), [*unwritten]
            unwritten.clear()
            for record in late:
                note(record)
            self.timeline.record("no_room", "controller", start_s=now - seconds, end_s=now)

        with PAUSE.reported(began, ended):
            yield

    async def prune(self, keep: int) -> None:
        """Remove all but the newest checkpoints, and start the upload to the mirror, after an upload in progress. An
        upload reads the checkpoints: while it hangs, no checkpoint is removed. Remove images that no step needs."""
        if self.images is not None:
            self.images.remove()
        if self.mirror is None:
            self.folder.prune(keep)
            return
        if (problem := await asyncio.to_thread(self.mirror.settle)) is not None:
            logger.warning(
                "the newest checkpoints are only on this machine; the next checkpoint tries again. %s", problem
            )
            self.tracker.log_error(ErrorRecord(step=self.step, stage="mirror", kind="not_uploaded", message=problem))
        if self.mirror.is_free():
            self.folder.prune(keep)
            self.mirror.begin(keep)

    async def commit_checkpoint(self, step: int) -> None:
        """Make the begun checkpoint valid, and notify the tracker's back ends. A thread syncs the files, but the
        checkpoint becomes valid in the event loop: never after a cancellation."""
        await asyncio.to_thread(self.folder.seal, self.folder.checkpoint(step), step=step)
        self.tracker.checkpoint(step, self.folder.commit_checkpoint(step))

    def failed(self, error: Exception) -> None:
        """Write the run's fatal error to errors.jsonl, and the traceback to traceback.txt. No write waits for room now.

        Incomplete checkpoints, which may fill the disk, are removed first. A later start in the folder is left alone.
        """
        PAUSE.give_up()
        if self.folder.is_taken_over():
            return
        self.folder.discard_begun()
        stack = error.stack if isinstance(error, WorkerLost) else None
        self.tracker.log_error(
            ErrorRecord(step=self.step + 1, stage="run", kind=type(error).__name__, message=str(error), stack=stack)
        )
        self.tracker.alert("failure", "run failed", f"Step {self.step + 1}: {error}")
        write_atomic(self.folder.path / "traceback.txt", redact("".join(traceback.format_exception(error))))

    def write_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        write_atomic(folder / STATE_FILE, json.dumps(state, indent=1) + "\n")

    def restore_best(self, best: Best, state: Mapping[str, Any]) -> None:
        """Restore the best evaluation of a checkpoint, and point `best` at the evaluation's checkpoint. After a resume
        from an older checkpoint, the best checkpoint may no longer exist. Then the run begins without a best
        evaluation."""
        best.restore(state)
        if best.step in self.folder.checkpoint_steps():
            self.folder.mark_best(best.step)
        elif best.step is not None:
            logger.warning(
                "the best checkpoint, of step %d, no longer exists, so the next evaluation counts as the best",
                best.step,
            )
            best.value = best.step = None

    def read_state(self, step: int) -> dict[str, Any]:
        return read_state(self.folder.checkpoint(step))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the controller's state in a checkpoint. Raise UserError if missing."""
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Name an earlier checkpoint, such as --resume step_000010."
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected an object. Name an earlier checkpoint.")
    return state


@dataclass(slots=True)
class Best:
    """The best evaluation so far, and the number of evaluations since."""

    metric: str  # name of the metric
    lower_is_better: bool
    stopping: EarlyStopping | None
    value: float | None = None
    step: int | None = None
    stale: int = 0  # evaluations since the last improvement

    @classmethod
    def of(cls, train: TrainConfig, default: str, *, default_lower: bool) -> Best:
        """Create the tracker of the configured metric (a leading - means lower is better), or of the default."""
        setting = train.best_metric
        return cls(
            metric=default if setting is None else setting.removeprefix("-"),
            lower_is_better=default_lower if setting is None else setting.startswith("-"),
            stopping=train.early_stopping,
        )

    def improves(self, row: Mapping[str, float], step: int) -> bool:
        """Return whether this step's row is the best so far. Remember the best row. UserError: the row lacks the
        metric.
        """
        if self.metric not in row:
            known = ", ".join(sorted(key for key in row if key.startswith("eval/")))
            raise UserError(
                f"train.best_metric: {self.metric!r} is not a metric of the evaluation. The metrics are: {known}"
            )
        value, sign = row[self.metric], -1.0 if self.lower_is_better else 1.0
        gain = math.inf if self.value is None else sign * (value - self.value)
        needed = 0.0 if self.stopping is None else self.stopping.min_delta
        if math.isnan(value) or not gain > needed:  # nan: no values, or a diverged model
            self.stale += 1
            return False
        self.value, self.step, self.stale = value, step, 0
        return True

    @property
    def is_over(self) -> bool:
        return self.stopping is not None and self.stale >= self.stopping.patience

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "stale": self.stale}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.value, self.step, self.stale = state["value"], state["step"], state["stale"]
