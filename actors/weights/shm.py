"""Weights in shared memory without a name: trainer and engines on one host, no copy in between.

The trainer's first rank creates a memfd, and the engines open it through the process's entry in /proc. Other users
cannot open the memory, and the kernel frees the memory when the processes end, even by a kill. Every sync writes in
place, so both sides keep the mapping and the pages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from actors.weights.staging import WeightSender
from rlhf.errors import RunError
from rlhf.process.system_calls import memfd

GROW_BY = 64 << 20  # bytes; only the first publication grows the memory


class ShmSender(WeightSender):
    """The policy's end. Rank 0 owns the memory."""

    transport = "shm"
    memory: SharedMemory | None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = SharedMemory() if self.rank == 0 else None

    def fields(self) -> Mapping[str, Any]:
        assert self.memory is not None
        return {"path": str(self.memory.path)}

    def close(self) -> None:
        """Free the memory. Engines with an open mapping keep their pages."""
        if self.memory is not None:
            self.memory.close()


class SharedMemory:
    """Shared memory that grows on demand. Processes of the same user and host open the memory by path."""

    def __init__(self) -> None:
        self.descriptor = memfd("rlhf-weights")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")
        self.flat = torch.empty(0, dtype=torch.uint8)

    def region(self, begin: int, end: int) -> UInt8[Tensor, " bytes"]:
        """Map at least `end` bytes and return this part. RunError if the host has too little memory."""
        size = self.flat.numel()
        if end > size:
            wanted = max(end, size + GROW_BY)
            try:
                os.posix_fallocate(self.descriptor, size, wanted - size)
            except OSError as error:
                raise RunError(
                    f"weight sync: the host has too little memory for the policy's weights. {size / 2**30:.2f} GiB are "
                    f"written, and {wanted / 2**30:.2f} GiB are needed now ({error}). `rlhf plan` shows how much "
                    "memory a host needs."
                ) from error
            self.flat = torch.from_file(str(self.path), shared=True, size=wanted, dtype=torch.uint8)
        return self.flat[begin:end]

    def close(self) -> None:
        """Unmap and close. Safe to call twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.flat = torch.empty(0, dtype=torch.uint8)
