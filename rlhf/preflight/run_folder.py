"""Check a run's folder and its mirror before anything starts: whether the run can begin there, or resume from it.

It changes nothing, except that each of the two gets what the other alone has, and that a named checkpoint becomes the
one to resume from.
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
from rlhf.data.stream import Cursor, Stream
from rlhf.errors import UserError
from rlhf.preflight.inputs import OnlineInputs, StageInputs
from rlhf.preflight.models import refuse_other_model
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.mirror import Mirror

logger = logging.getLogger(__name__)


def check_folders(stages: Iterable[Stage], *, resume: bool, from_step: int | None) -> None:
    """Check every stage's folder and mirror.

    from_step: the first stage that is not finished resumes from this step's checkpoint; None: from its newest.
    """
    for stage in stages:
        meet_mirror(stage, resume=resume, step=from_step)
        if from_step is not None and not result_of(stage).exists():
            _continue_from(stage, from_step)
            from_step = None
        refuse_unusable_folder(stage, resume=resume)
    if from_step is not None:
        raise UserError(f"--resume: is step_{from_step:06d}, but the run is finished. Choose another run.name.")


def meet_mirror(stage: Stage, *, resume: bool, step: int | None = None) -> None:
    """With `resume`, bring here what the mirror has and the folder lacks, or there a result that is here alone.

    step: of the checkpoint to bring, if it is not the newest. UserError if a new run would replace one.
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
                f"run.mirror: {mirror.place} already holds a run. Continue it with --resume auto, choose another "
                "run.name, or remove it there."
            )


def refuse_unusable_folder(stage: Stage, *, resume: bool) -> None:
    """UserError if the run's folder cannot be written, is in use, or holds what this run would not go on from."""
    path = run_folder(stage)
    if resume and result_of(stage).exists():
        _refuse_other_settings(stage)
        return
    try:
        with RunFolder.open(stage.run.dir, stage.run.name, resume=resume) as folder:
            step = folder.latest_checkpoint() if resume else None
            if step is not None:
                folder.refuse_damage(step)
    except OSError as error:
        raise UserError(
            f"run.dir: {path} cannot be written: {error.strerror}. Choose a folder you can write."
        ) from error


def _continue_from(stage: Stage, step: int) -> None:
    """Let the stage resume from the checkpoint of this step. UserError if it has none, or a damaged one."""
    with RunFolder.open(stage.run.dir, stage.run.name, resume=True) as folder:
        if not folder.checkpoint(step).is_dir():
            names = ", ".join(sorted(path.name for path in folder.checkpoints.glob("step_*"))) or "none"
            raise UserError(
                f"--resume: {folder.path} has no checkpoint {folder.checkpoint(step).name}. Its checkpoints: {names}."
            )
        folder.refuse_damage(step)
        folder.continue_from(step)


def _refuse_other_settings(stage: Stage) -> None:
    """UserError if a finished run was made with other settings than it has now."""
    try:
        (made_with,) = load(run_folder(stage) / "config.resolved.yaml").stages.values()
    except UserError as error:
        logger.warning("%s is finished; with which settings is not known: %s", run_folder(stage), error)
        return
    changed = changes(made_with, stage)
    if changed:
        raise UserError(
            f"--resume: {run_folder(stage)} is finished, with other settings: {'; '.join(changed)}. Choose another "
            "run.name, or remove the folder to do it anew."
        )


def refuse_other_checkpoint(stage: StageInputs) -> None:
    """UserError if the newest checkpoint in the run's folder is of another model or other data, or of a later step."""
    config = stage.config
    if result_of(stage.written).exists():
        return
    with RunFolder.open(config.run.dir, config.run.name, resume=True) as folder:
        step = folder.latest_checkpoint()
        if step is None:
            return
        state = read_state(folder.checkpoint(step))
        if step > config.train.num_steps:
            raise UserError(
                f"train.steps: is {config.train.num_steps}, but {folder.checkpoint(step)} has done {step} already. "
                "Raise it, or write that checkpoint as a model with `rlhf export`."
            )
        try:
            refuse_other_model(config, state, checkpoint=folder.checkpoint(step))
            stream_of(stage).restore(Cursor(**state["cursor"]))
            reference_step = state.get("reference_step")
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder.checkpoint(step)} was written by another version of this program: its state has no "
                f"{error}. Resume with that version, or start again under another run.name."
            ) from error
        if reference_step:
            folder.refuse_damaged_reference(reference_step, checkpoint=step)


def stream_of(stage: StageInputs) -> Stream[Any]:
    """The training data in the run's order."""
    config, inputs = stage.config, stage.inputs
    items: Sequence[Any] = inputs.prompts if isinstance(inputs, OnlineInputs) else inputs.rows
    return Stream(items, seed=config.run.seed, shuffle=config.data.shuffle, shares=inputs.shares)


def open_mirror(stage: Stage, folder: RunFolder) -> Mirror | None:
    """Where the run's folder is copied to; None: nowhere."""
    return None if stage.run.mirror is None else Mirror(stage.run.mirror, folder, name=stage.run.name)


def kept_checkpoints(stage: Stage) -> int:
    """How many of the newest stay; a merge or an evaluation has none."""
    return stage.train.keep_checkpoints if isinstance(stage, Config) else 1
