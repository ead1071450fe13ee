"""Base of every process with a model: device, forward passes and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.engine.distributed import RankContext
from rlhf.engine.memory import explains_out_of_memory, peak_memory
from rlhf.engine.profiling import StepProfiler
from rlhf.role_table import Role
from rlhf.types import MemoryReport
from rlhf.workers.microbatches import Microbatch

T = TypeVar("T")


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class ModelWorker:
    role: Role

    def __init__(self, place: RankContext) -> None:
        self.place = place
        self.device = place.torch_device()
        self.profiler = StepProfiler()
        torch.set_num_threads(place.threads)

    def explaining(self, stage: str, microbatch: Microbatch | None = None) -> AbstractContextManager[None]:
        """Turn a failed allocation in the block into an error with the keys to change."""
        tokens = None if microbatch is None else len(microbatch.tokens)
        return explains_out_of_memory(role=self.role, stage=stage, rank=self.place.rank, tokens=tokens)

    def passes(
        self, stage: str, microbatches: Iterable[Microbatch], compute: Callable[[Microbatch], T]
    ) -> Iterator[tuple[Microbatch, T]]:
        """Yield each micro-batch with the result of `compute`, run without a gradient."""
        for microbatch in microbatches:
            with torch.no_grad(), self.explaining(stage, microbatch):
                result = compute(microbatch)
            yield microbatch, result

    def part(self, column: Tensor, microbatch: Microbatch) -> Tensor:
        return column[microbatch.tokens].to(self.device)

    def temperature_at(self, temperatures: float | Tensor, microbatch: Microbatch) -> float | Tensor:
        return self.part(temperatures, microbatch) if isinstance(temperatures, Tensor) else temperatures

    def memory(self) -> MemoryReport:
        return peak_memory()

    def start_profile(self) -> None:
        self.profiler.start()

    def stop_profile(self, folder: Path) -> None:
        self.profiler.stop(folder / f"{self.role}-{self.place.rank}.json.gz")
