"""The files of each rank in a checkpoint, written from the rank's state or from a snapshot in shared memory.

A checkpoint of a role has the record of the engine (engine.json), and for each rank the random states
(random_00000.json) and the state (state_00000.safetensors). At stage 0 all ranks have the same state, which rank 0
writes. The tensors have the names of rlhf.engine.rank_state.
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
from rlhf.engine.snapshot_copies import description_path, slot_path
from rlhf.engine.snapshots import tensors_in
from rlhf.engine.tensor_files import read_tensors, to_json, unreadable, write_tensors
from rlhf.tracking.run_folder.atomic import write_atomic

_STATE, _RANDOM = "state_{:05d}.safetensors", "random_{:05d}.json"
_OF_EACH_RANK = ("master ", "state ")  # the rest has shares at stage 3 alone
_VALUES = ("states", "counters", "period")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The state of a rank in a checkpoint. The tensors stay on the disk until their use."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    @property
    def masters(self) -> list[Tensor]:
        return [self.tensors[f"master {index}"] for index in range(len(self.values["states"]))]

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """Return the tensors of the optimizer's state of each master."""
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.values["states"]}
        for name, tensor in self.tensors.items():
            owner, _, key = name.rpartition(" ")
            if owner in states:
                states[owner][key] = tensor
        return list(states.values())


def write_rank(checkpoint: Path, rank: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write the files of a rank. Rank 0 also writes the record, and all that is the same on every rank.

    values: of rlhf.engine.rank_state, with the `record` of the engine.
    """
    record = EngineRecord.model_validate(values["record"])
    write_atomic(checkpoint / _RANDOM.format(rank), to_json(values["random"]))
    if rank == 0 or record.zero_stage > 0:
        if rank > 0 and record.zero_stage < 3:
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_OF_EACH_RANK)}
        write_tensors(checkpoint / _STATE.format(rank), tensors, {key: values[key] for key in _VALUES})
    if rank == 0:
        record.write(checkpoint)


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


def read_random(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Return the random states of a rank. Raise UserError for a missing or damaged file."""
    path = checkpoint / _RANDOM.format(rank)
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise unreadable(path, error) from error
