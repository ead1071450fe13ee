"""The files of each rank in a checkpoint, written from the rank's state or from a snapshot in shared memory.

A checkpoint of a role has the record of the engine (engine.json), and for each rank the random states
(random_00000.json) and the state (state_00000.safetensors). rlhf.engine.rank_state declares the fields, and which ranks
write them: at stage 0 all ranks have the same state, which rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.rank_state import Sharing, sharing_of
from rlhf.engine.snapshot_copies import description_path, slot_path
from rlhf.engine.snapshots import tensors_in
from rlhf.engine.tensor_files import read_tensors, to_json, unreadable, write_tensors
from rlhf.tracking.run_folder.atomic import write_atomic

_STATE = "state_{:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The state of a rank in a checkpoint. The tensors stay on the disk until their use."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write_rank(checkpoint: Path, rank: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write the files of a rank: the fields that the rank has to write. Rank 0 also writes the record.

    values: of rlhf.engine.rank_state, with the `record` of the engine. RunError: a name is not of a declared field.
    """
    record = EngineRecord.model_validate(values["record"])
    written = {name: sharing_of(name) for name in (*tensors, *values) if name != "record"}
    written = {name: sharing for name, sharing in written.items() if rank in sharing.writers(record.sharding)}
    of_state = {name for name, sharing in written.items() if sharing is not Sharing.OWN}
    for name in written.keys() - of_state:
        write_atomic(_own_file(checkpoint, name, rank), to_json(values[name]))
    if of_state:
        state = {name: tensor for name, tensor in tensors.items() if name in of_state}
        write_tensors(checkpoint / _STATE.format(rank), state, {key: values[key] for key in of_state & values.keys()})
    if rank == 0:
        record.write(checkpoint)


def _own_file(checkpoint: Path, name: str, rank: int) -> Path:
    return checkpoint / f"{name}_{rank:05d}.json"


def write_snapshot(source: Path, step: int, checkpoint: Path, rank: int) -> None:
    """Write the files of a rank from the rank's snapshot of a step in shared memory. OSError: missing or incomplete."""
    content = json.loads(description_path(source, step).read_bytes())
    slot = slot_path(source, content["slot"])
    try:
        flat = torch.from_file(str(slot), shared=True, size=slot.stat().st_size, dtype=torch.uint8)
        tensors = tensors_in(flat, content["layout"])
    except RuntimeError as error:
        raise OSError(f"{slot} does not hold the snapshot of step {step}: {error}") from error
    write_rank(checkpoint, rank, tensors, content["values"])


def read_rank(checkpoint: Path, rank: int) -> RankFile:
    """Return the state that a rank has written. Raise UserError for a missing or damaged file."""
    tensors, values = read_tensors(checkpoint / _STATE.format(rank))
    return RankFile(tensors=tensors, values=values)


def read_own(checkpoint: Path, name: str, rank: int) -> dict[str, Any]:
    """Return a field that each rank has for itself. Raise UserError for a missing or damaged file."""
    path = _own_file(checkpoint, name, rank)
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise unreadable(path, error) from error
