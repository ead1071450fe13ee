"""Open the folder and the record of a training run, a merge or an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.cluster.connect import OWN_RAY
from actors.cluster.prometheus import PrometheusBackend
from rlhf.config.files.dump import dump_masked_yaml, dump_yaml
from rlhf.config.schema.cluster import Restarts
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage
from rlhf.config.yaml_tree import from_yaml
from rlhf.controller.callback_calls import CallbackCalls
from rlhf.controller.record import RunRecord
from rlhf.errors import Preempted, RunError, StorageFull
from rlhf.preflight.run_folder import kept_checkpoints, open_mirror
from rlhf.preflight.sources import installed_trackers
from rlhf.process.disk_full import PAUSE
from rlhf.process.driver_parent import tell_parent
from rlhf.process.stopping import current_request
from rlhf.tracking.callbacks import Callback
from rlhf.tracking.display.progress import Mode
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.logs import written_to
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.environment import record_environment
from rlhf.tracking.run_folder.folder import RunFolder, images_folder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.backends import TrackerBackend
from rlhf.tracking.sinks.tensorboard_backend import open_tensorboard
from rlhf.tracking.sinks.tracker import Tracker
from rlhf.tracking.sinks.wandb_backend import open_wandb
from rlhf.vision.thumbnails import thumbnail

logger = logging.getLogger(__name__)


@contextmanager
def recording(
    stage: Stage,
    *,
    resume: bool,
    steps: int = 0,
    show: Sequence[str] = (),
    mode: Mode = "quiet",
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Any] = (),
) -> Iterator[tuple[RunRecord, int | None]]:
    """Open the record, and yield it with the step of the checkpoint to resume from. None: no checkpoint.

    Failures in the block are recorded. `steps`, `show` and `mode` are for the progress display. `trackers` are objects
    passed to the call.
    """
    room_s = 0.0 if isinstance(stage, MergeStage) else stage.cluster.room_timeout_s
    with (
        PAUSE.limited(room_s),
        RunFolder.open(stage.run.dir, stage.run.name, resume=resume) as folder,
        _preempted_without_room(folder),
        written_to(folder.log),
    ):
        write_atomic(folder.config, dump_masked_yaml(stage))
        record_environment(folder.environment, seed=stage.run.seed)
        step = folder.latest_checkpoint() if resume else None
        keep, mirror = kept_checkpoints(stage), open_mirror(stage, folder)
        if mirror is not None:
            mirror.finish(keep, failed=False)  # fails before anything starts if the mirror is not writable
        after = None if not resume else -1 if step is None else step
        tracker = Tracker(folder.path, backends=_backends(stage, folder.path, after, trackers))
        timeline = Timeline(folder.timeline)
        failed = True
        try:
            if after is not None:
                tracker.truncate_after(after)
            limits = Restarts() if isinstance(stage, MergeStage) else stage.cluster.restarts
            tell_parent(folder=str(folder.path), restarts=limits.gang, window_s=limits.window_s)
            with open_progress(
                steps, done_steps=step or 0, show=show, mode=mode, run=stage.run.name, folder=folder.path
            ) as progress:
                record = RunRecord(
                    folder=folder,
                    tracker=tracker,
                    timeline=timeline,
                    progress=progress,
                    mirror=mirror,
                    callbacks=CallbackCalls(callbacks),
                    step=step or 0,
                )
                progress.stage("starting")
                try:
                    with record.pauses():
                        yield record, step
                except Preempted:
                    request = current_request()
                    if request is None or request.signal is None:  # the cluster has no room for the run
                        tell_parent(is_final=True)
                    raise
                except Exception as error:
                    tell_parent(is_final=not OWN_RAY.is_ending)  # another start gets another Ray
                    with _hiding_nothing():
                        record.failed(error)
                    raise
            failed = False
        finally:
            timeline.close()
            with _hiding_nothing() if failed else nullcontext():
                tracker.close(failed=failed)
            if mirror is not None:
                mirror.finish(keep, failed=failed)


@contextmanager
def _preempted_without_room(folder: RunFolder) -> Iterator[None]:
    """Raise Preempted instead of StorageFull if the folder has a checkpoint to continue from."""
    try:
        yield
    except StorageFull as error:
        if folder.checkpoint_steps():
            tell_parent(is_final=True)
            raise Preempted(str(error)) from error
        raise


@contextmanager
def _hiding_nothing() -> Iterator[None]:
    """Log errors raised in the block instead of raising, since an earlier error is about to be raised."""
    try:
        yield
    except (OSError, RunError) as error:
        logger.warning("the end of the run could not be written to its folder: %s", error)


def _backends(stage: Stage, folder: Path, after: int | None, trackers: Sequence[Any]) -> list[TrackerBackend]:
    """Return the configured back ends, and Prometheus in Ray. after: resumed step (-1: none); None: a new run."""
    if isinstance(stage, MergeStage):
        return []
    backends: list[TrackerBackend] = [PrometheusBackend(stage.run.name)] if ray.is_initialized() else []
    settings = stage.tracking
    if settings.tensorboard:
        backends.append(open_tensorboard(folder, done_steps=after))
    if settings.wandb != "off":
        pipeline, is_stage, _ = stage.run.name.partition("/")
        wandb = open_wandb(
            folder,
            mode=settings.wandb,
            entity=settings.wandb_entity,
            project=settings.wandb_project,
            name=stage.run.name,
            job_type=stage.algorithm.short_name if isinstance(stage, Config) else "evaluation",
            group=settings.wandb_group or (pipeline if is_stage else None),
            tags=settings.wandb_tags,
            config=from_yaml(dump_yaml(stage)),
            checkpoints=settings.wandb_checkpoints,
            image_of=partial(thumbnail, images_folder(folder)),
        )
        backends.append(wandb)
    return [*backends, *installed_trackers(stage, trackers, done_steps=after)]
