"""What stands in a run's folder, or in its mirror, looked at before anything starts: whether the run can begin there,
or go on from it. It changes nothing but to bring to the one what the other alone has.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from actors.inputs import OnlineInputs, StageInputs
from actors.models import refuse_other_model
from actors.recording import kept_checkpoints, open_mirror
from rlhf.config.differences import changes
from rlhf.config.load import load
from rlhf.config.stages import Stage, result_of, run_folder
from rlhf.controller.record import read_state
from rlhf.data.stream import Cursor, Stream
from rlhf.errors import UserError
from rlhf.tracking.run_folder import RunFolder

logger = logging.getLogger(__name__)


def meet_mirror(stage: Stage, *, resume: bool) -> None:
    """With `resume`, bring here what the mirror has and the folder lacks, or there a result that is here alone.

    UserError if a new run would replace one.
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
            mirror.fetch()
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
            if resume and folder.latest_checkpoint() is None and any(folder.checkpoints.glob("step_*")):
                raise UserError(
                    f"--resume: no checkpoint in {folder.checkpoints} is whole, so there is nothing to go on from. "
                    "Bring one back from a copy, or remove the folder's checkpoints to start from the beginning."
                )
    except OSError as error:
        raise UserError(
            f"run.dir: {path} cannot be written: {error.strerror}. Choose a folder you can write."
        ) from error


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
        if step > config.train.steps:
            raise UserError(
                f"train.steps: is {config.train.steps}, but {folder.checkpoint(step)} has done {step} already. "
                "Raise it, or write that checkpoint as a model with `rlhf export`."
            )
        refuse_other_model(config, state, checkpoint=folder.checkpoint(step))
        stream_of(stage).restore(Cursor(**state["cursor"]))


def stream_of(stage: StageInputs) -> Stream[Any]:
    """The training data in the run's order."""
    config, inputs = stage.config, stage.inputs
    items: Sequence[Any] = inputs.prompts if isinstance(inputs, OnlineInputs) else inputs.rows
    return Stream(items, seed=config.run.seed, shuffle=config.data.shuffle, shares=inputs.shares)
