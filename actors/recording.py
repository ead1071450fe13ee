"""A run's folder with all that is written of it, open while it runs: of a training run, a merge or an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rlhf.config.dump import dump_yaml
from rlhf.config.root import Config
from rlhf.config.stages import MergeStage, Stage
from rlhf.controller.record import RunRecord
from rlhf.errors import RunError
from rlhf.tracking.mirror import Mirror
from rlhf.tracking.progress import Mode, open_progress
from rlhf.tracking.run_folder import RunFolder
from rlhf.tracking.timeline import Timeline
from rlhf.tracking.tracker import Tracker, TrackerBackend
from rlhf.tracking.wandb_backend import open_wandb

logger = logging.getLogger(__name__)


@contextmanager
def recording(
    stage: Stage, *, resume: bool, steps: int = 0, show: Sequence[str] = (), mode: Mode = "quiet"
) -> Iterator[tuple[RunRecord, int | None]]:
    """The record, and the step of the checkpoint to go on from; None: there is none. A failure is written down.

    steps, show, mode: of the progress display.
    """
    with RunFolder.open(stage.run.dir, stage.run.name, resume=resume) as folder:
        folder.write_config(dump_yaml(stage))
        folder.write_environment(seed=stage.run.seed)
        step = folder.latest_checkpoint() if resume else None
        keep = stage.train.keep_checkpoints if isinstance(stage, Config) else 1
        mirror = open_mirror(stage, folder)
        if mirror is not None:
            mirror.finish(keep, failed=False)  # what cannot be written there is known before anything starts
        tracker = Tracker(folder.path, backends=_backends(stage, folder.path), max_staleness=_max_staleness(stage))
        timeline = Timeline(folder.timeline)
        failed = True
        try:
            if resume:
                tracker.truncate_after(step if step is not None else -1)
            with open_progress(
                steps, done_steps=step or 0, show=show, mode=mode, run=stage.run.name, folder=folder.path
            ) as progress:
                record = RunRecord(
                    folder=folder,
                    tracker=tracker,
                    timeline=timeline,
                    progress=progress,
                    mirror=mirror,
                    step=step or 0,
                )
                progress.stage("starting")
                try:
                    yield record, step
                except Exception as error:
                    with _hiding_nothing():
                        record.failed(error)
                    raise
            failed = False
        finally:
            with _hiding_nothing() if failed else nullcontext():
                tracker.close(failed=failed)
            timeline.close()
            if mirror is not None:
                mirror.finish(keep, failed=failed)


def open_mirror(stage: Stage, folder: RunFolder) -> Mirror | None:
    """Where the run's folder is copied to; None: nowhere."""
    return None if stage.run.mirror is None else Mirror(stage.run.mirror, folder, name=stage.run.name)


@contextmanager
def _hiding_nothing() -> Iterator[None]:
    """What fails inside is only logged: another failure is on its way, and is the one to be told."""
    try:
        yield
    except (OSError, RunError) as error:
        logger.warning("the end of the run could not be written down: %s", error)


def _max_staleness(stage: Stage) -> int | None:
    """Of a run that samples."""
    return stage.rollouts.max_staleness if isinstance(stage, Config) and stage.rollouts is not None else None


def _backends(stage: Stage, folder: Path) -> list[TrackerBackend]:
    """W&B if it is asked for. The stages of a pipeline are one group of W&B runs; a merge has no metrics."""
    if isinstance(stage, MergeStage) or stage.tracking.wandb == "off":
        return []
    pipeline, is_stage, _ = stage.run.name.partition("/")
    return [
        open_wandb(
            folder,
            mode=stage.tracking.wandb,
            project=stage.tracking.wandb_project,
            name=stage.run.name,
            config=stage.model_dump(mode="json"),
            group=stage.tracking.wandb_group or (pipeline if is_stage else None),
        )
    ]
