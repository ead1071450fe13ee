"""The place of a rank in its gang of processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Identity and limits of one rank of a trained role, or of one worker of a forward role (a gang of one)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str  # cpu or cuda; the process sees one GPU
    threads: int
    deadline_s: float

    def torch_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
