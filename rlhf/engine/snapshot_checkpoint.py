"""A checkpoint made of the snapshots of ranks that have stopped and cannot be started again.

The checkpoint holds the files of rlhf.engine.snapshots, a pair for each rank, beside the usual record of the engine and
the random states.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.snapshots import tensors_in
from rlhf.errors import UserError

SNAPSHOTS = "snapshots"  # folder of a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSnapshot:
    """The state of a rank. The tensors stay on the disk until use."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    @property
    def masters(self) -> list[Tensor]:
        return [self.tensors[f"master {index}"] for index in range(len(self.values["states"]))]

    @property
    def states(self) -> list[dict[str, Any]]:
        """Return the optimizer's state of each master."""
        states = {name: dict(numbers) for name, numbers in self.values["states"].items()}
        for name, tensor in self.tensors.items():
            owner, _, key = name.rpartition(" ")
            if owner in states:
                states[owner][key] = tensor
        return list(states.values())


def write_snapshot(source: Path, step: int, checkpoint: Path, rank: int) -> None:
    """Copy a rank's snapshot of a step out of shared memory. Raise OSError for a missing or incomplete snapshot."""
    described, folder = source / f"{step}.pt", checkpoint / SNAPSHOTS
    content = torch.load(described, weights_only=True)
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source / f"slot_{content['slot']}", folder / f"{rank:05d}.slot")
    shutil.copyfile(described, folder / f"{rank:05d}.pt")
    torch.save(content["values"]["random"], checkpoint / f"random_{rank:05d}.pt")
    if rank == 0:
        EngineRecord.model_validate(content["values"]["record"]).write(checkpoint)


def is_of_snapshots(checkpoint: Path) -> bool:
    return (checkpoint / SNAPSHOTS).is_dir()


def read_snapshot(checkpoint: Path, rank: int) -> RankSnapshot:
    """Return the state of a rank. Raise UserError for damaged files."""
    from rlhf.engine.checkpoint_files import load_data  # imports DeepSpeed

    path = checkpoint / SNAPSHOTS / f"{rank:05d}.pt"
    content, slot = load_data(path), path.with_suffix(".slot")
    try:
        flat = torch.from_file(str(slot), shared=False, size=slot.stat().st_size, dtype=torch.uint8)
        return RankSnapshot(tensors=tensors_in(flat, content["layout"]), values=content["values"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{slot} does not hold the state of a rank: {type(error).__name__}: {error}. Restore the file from a copy, "
            "or resume from an earlier checkpoint."
        ) from error
