"""Check a run's folder and its mirror before anything starts: whether the run can begin or resume there.

The checks copy missing files between folder and mirror. Nothing else changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf.config.files.differences import changes
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import Stage, result_of, run_folder
from rlhf.controller.record import read_state
from rlhf.data.prompts import skipped_rows
from rlhf.data.stream import Cursor, Stream
from rlhf.data.windows import DataStream
from rlhf.errors import UserError
from rlhf.preflight.inputs import StageInputs
from rlhf.preflight.models import refuse_other_model
from rlhf.preflight.start import Start
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.mirror import Mirror

logger = logging.getLogger(__name__)


def check_folders(stages: Iterable[Stage], start: Start) -> None:
    """Check every stage's folder and mirror."""
    step = start.from_step
    for stage in stages:
        meet_mirror(stage, resume=start.resume, step=step)
        refuse_unusable_folder(stage, resume=start.resume, step=step)
        if not result_of(stage).exists():
            step = None
    if step is not None:
        raise UserError(f"--resume: is step_{step:06d}, but the run is finished. Choose another run.name.")


def meet_mirror(stage: Stage, *, resume: bool, step: int | None = None) -> None:
    """With `resume`, download missing files from the mirror, or upload a result missing there.

    `step` selects the checkpoint to download instead of the newest. UserError: a run is there, without `resume`.
    """
    if stage.run.mirror is None:
        return
    with RunFolder.open(stage.run.dir, stage.run.name, resume=resume) as folder:
        mirror = open_mirror(stage, folder)
        assert mirror is not None
        if resume and result_of(stage).exists():
            if not mirror.holds_result():
                mirror.finish(kept_checkpoints(stage), failed=False)
        elif resume:
            mirror.fetch(step=step)
        elif mirror.holds_run():
            raise UserError(
                f"run.mirror: {mirror.place} already holds a run. Continue this run with --resume auto, choose "
                "another run.name, or remove the run from the mirror."
            )


def refuse_unusable_folder(stage: Stage, *, resume: bool, step: int | None = None) -> None:
    """Raise UserError if the run's folder is not writable, is in use, or cannot continue, from `step` or the newest."""
    path = run_folder(stage)
    if resume and result_of(stage).exists():
        _refuse_other_settings(stage)
        return
    try:
        with RunFolder.open(stage.run.dir, stage.run.name, resume=resume) as folder:
            if step is None:
                step = folder.latest_checkpoint() if resume else None
            elif not folder.checkpoint(step).is_dir():
                names = ", ".join(sorted(path.name for path in folder.checkpoints.glob("step_*"))) or "none"
                raise UserError(
                    f"--resume: {path} has no checkpoint {folder.checkpoint(step).name}. Its checkpoints: {names}."
                )
            if step is not None:
                folder.refuse_damage(step)
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be written: {error.strerror}. Choose another folder.") from error


def continue_from(stage: Stage, step: int) -> None:
    """Select the checkpoint of this step for the resumption. Only once nothing is left to check."""
    with RunFolder.open(stage.run.dir, stage.run.name, resume=True) as folder:
        folder.continue_from(step)


def _refuse_other_settings(stage: Stage) -> None:
    """Raise UserError if a finished run was made with settings different from the present settings."""
    try:
        (made_with,) = load(run_folder(stage) / "config.resolved.yaml").stages.values()
    except UserError as error:
        logger.warning("%s is finished, but its settings cannot be read: %s", run_folder(stage), error)
        return
    changed = changes(made_with, stage)
    if changed:
        raise UserError(
            f"--resume: {run_folder(stage)} is finished, with other settings: {'; '.join(changed)}. Choose another "
            "run.name, or remove the folder to repeat the run."
        )


def refuse_other_checkpoint(stage: StageInputs, *, step: int | None = None) -> None:
    """Raise UserError if the checkpoint (of `step`, or the newest) has other models or data, or too many steps."""
    config = stage.config
    if result_of(stage.written).exists():
        return
    with RunFolder.open(config.run.dir, config.run.name, resume=True) as folder:
        step = folder.latest_checkpoint() if step is None else step
        if step is None:
            return
        state = read_state(folder.checkpoint(step))
        if step > config.train.num_steps:
            raise UserError(
                f"train.steps: is {config.train.num_steps}, but {folder.checkpoint(step)} has done {step} steps "
                "already. Raise train.steps, or write this checkpoint as a model with `rlhf export`."
            )
        try:
            refuse_other_model(config, state, checkpoint=folder.checkpoint(step))
            if config.rollouts is not None and "ahead" not in state:
                raise KeyError("ahead")
            stream_of(stage).check(Cursor(**state["cursor"]))
            reference_step = state.get("reference_step")
            warn_of_changed_code(stage.inputs, state, step=step)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder.checkpoint(step)} was written by another version of this program: its state has no {error}. "
                "Resume with the earlier version of the program, or start again under another run.name."
            ) from error
        if reference_step:
            folder.refuse_damaged_reference(reference_step, checkpoint=step)


def warn_of_changed_code(inputs: OnlineInputs | OfflineInputs, state: dict[str, Any], *, step: int) -> None:
    """Log the rewards and the environment if their code or arguments differ from the checkpoint."""
    code = inputs.code() if isinstance(inputs, OnlineInputs) else {}
    before = state.get("code", {})
    if changed := [key for key, digest in code.items() if before.get(key, digest) != digest]:
        text = "the code or the arguments of %s have changed since the checkpoint of step %d; the run uses the new ones"
        logger.warning(text, " and ".join(changed), step)


def stream_of(stage: StageInputs) -> DataStream[Any]:
    """Return the training data in the run's order, at the beginning."""
    config, inputs = stage.config, stage.inputs
    if inputs.stream is not None:
        return inputs.stream
    items: Sequence[Any] = inputs.prompts if isinstance(inputs, OnlineInputs) else inputs.rows
    skipped = skipped_rows(inputs.prompts) if isinstance(inputs, OnlineInputs) else ()
    return Stream(items, seed=config.run.seed, shuffle=config.data.shuffle, shares=inputs.shares, skipped_rows=skipped)


def open_mirror(stage: Stage, folder: RunFolder) -> Mirror | None:
    return None if stage.run.mirror is None else Mirror(stage.run.mirror, folder, name=stage.run.name)


def kept_checkpoints(stage: Stage) -> int:
    return stage.train.keep_checkpoints if isinstance(stage, Config) else 1
