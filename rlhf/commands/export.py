"""`rlhf export RUN FOLDER`: write a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from rlhf.commands.command import Command
from rlhf.commands.shared import stoppable


@stoppable
def export(
    run: str | PathLike[str],
    folder: str | Path,
    *,
    step: int | None = None,
    merged: bool = False,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    Args:
        run (RUN): the folder of the run, or of a state saved by a client of `rlhf tinker`.
        folder (FOLDER): the folder to write.
        step (STEP): the step of the checkpoint; the latest if not given.
        merged: for a run with LoRA, write a whole model with the adapter in its weights instead of an adapter folder.
        push_to_hub (OWNER/NAME): upload the folder to this repository of the hub.
        trust_remote_code: run Python code that comes with the model, or the file in the run's algorithm.name.
    """
    from rlhf.exporting import export_checkpoint

    export_checkpoint(
        Path(run),
        folder=Path(folder),
        step=step,
        merged=merged,
        push_to_hub=push_to_hub,
        trust_remote_code=trust_remote_code,
    )


COMMAND = Command(export)
