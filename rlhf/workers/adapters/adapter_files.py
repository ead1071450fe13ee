"""Folders of adapters: an export for peft and engines, and a checkpoint for an exact continuation.

A checkpoint is such an export in float32, with the moments in a further safetensors file, a record, and a manifest.
Nothing depends on the ranks, on the ZeRO stage or on the largest rank.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf.adapters import AdapterShape
from rlhf.engine.swapping import MOMENTS, WholeState
from rlhf.errors import UserError
from rlhf.models.adapters.config import WEIGHTS
from rlhf.models.adapters.slot import AdapterSlot
from rlhf.models.files.export import appearing
from rlhf.models.files.loading import architecture_fingerprint
from rlhf.models.files.weights import saved_name
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.atomic import sync_tree, write_aside, write_atomic
from rlhf.tracking.run_folder.manifest import Manifest, find_damage

RECORD, OPTIMIZER = "adapter_state.json", "optimizer.safetensors"


class AdapterRecord(BaseModel):
    """Shape, base and optimizer steps of the adapter in a checkpoint."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str  # fingerprint of the base model's architecture
    rank: int
    alpha: float
    attention: bool
    mlp: bool
    steps: NonNegativeInt

    @classmethod
    def of(cls, shape: AdapterShape, *, model: Any, steps: int) -> AdapterRecord:
        values = {name: value for name, value in asdict(shape).items() if name != "seed"}
        return cls(model=architecture_fingerprint(model.config), steps=steps, **values)

    def refuse_other(self, own: AdapterRecord, folder: Path) -> None:
        """Raise UserError if the checkpoint is of an adapter with another shape or base."""
        there, here = (one.model_dump(exclude={"steps"}) for one in (self, own))
        if differing := "; ".join(
            f"{key} {there[key]} there, {here[key]} here" for key in there if there[key] != here[key]
        ):
            raise UserError(f"The adapter in {folder} does not fit: {differing}. Load it into an adapter of its shape.")


def write_export(
    folder: Path, state: WholeState, shape: AdapterShape, *, slot: AdapterSlot, dtype: torch.dtype
) -> None:
    """Write the weights as peft's folder, in the adapter's own rank. An existing folder is replaced."""
    with appearing(folder) as partial:
        _write_weights(partial, state, shape, slot=slot, dtype=dtype)


def write_adapter_state(folder: Path, state: WholeState, shape: AdapterShape, *, slot: AdapterSlot, model: Any) -> None:
    """Write a checkpoint of an adapter. An existing folder is replaced."""
    with appearing(folder) as partial:
        _write_weights(partial, state, shape, slot=slot, dtype=torch.float32)
        tensors = {
            f"{moment}.{saved_name(name)}": tensor
            for moment in MOMENTS
            for name, tensor in slot.trimmed(shape, state.moments[moment]).items()
        }
        write_aside(partial / OPTIMIZER, lambda aside: save_file(tensors, aside))
        record = AdapterRecord.of(shape, model=model, steps=state.steps)
        write_atomic(partial / RECORD, record.model_dump_json(indent=1))
        Manifest.of(partial, step=None).write(partial)
        sync_tree(partial)


def read_adapter_state(
    folder: Path, shape: AdapterShape, *, slot: AdapterSlot, model: Any, optimizer: bool
) -> WholeState:
    """Return the state of a checkpoint. Without `optimizer`, moments and steps are zero.

    Raise UserError for a damaged folder, or a different adapter.
    """
    if (damage := find_damage(folder, step=None)) is not None:
        raise UserError(f"The adapter in {folder} cannot be loaded: {damage} Load another checkpoint.")
    try:
        record = AdapterRecord.model_validate_json((folder / RECORD).read_bytes())
        weights = load_file(folder / WEIGHTS)
        moments = load_file(folder / OPTIMIZER) if optimizer else {}
    except (OSError, ValidationError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} is not a checkpoint of an adapter: {reason}. Load a folder that this program has saved."
        ) from error
    record.refuse_other(AdapterRecord.of(shape, model=model, steps=0), folder)
    wanted = slot.trimmed(shape, slot.padded(shape, {}))
    blank = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    try:
        return WholeState(
            weights=slot.padded(shape, {name: weights[saved_name(name)] for name in wanted}),
            moments={
                moment: slot.padded(
                    shape, {name: moments[f"{moment}.{saved_name(name)}"] for name in wanted} if optimizer else blank
                )
                for moment in MOMENTS
            },
            steps=record.steps if optimizer else 0,
        )
    except (KeyError, RuntimeError) as error:
        raise UserError(f"The adapter in {folder} has other weights than this model's adapter: {error}.") from error


def _write_weights(
    folder: Path, state: WholeState, shape: AdapterShape, *, slot: AdapterSlot, dtype: torch.dtype
) -> None:
    tensors = {saved_name(n): t.to(dtype).contiguous() for n, t in slot.trimmed(shape, state.weights).items()}
    write_aside(folder / WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    when_there_is_room(folder, lambda: slot.config(shape).save_pretrained(folder))
