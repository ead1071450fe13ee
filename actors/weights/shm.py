"""Weights over one file in /dev/shm: trainer and engines on one host, no copy in between.

The file is written in place at every sync, so both sides keep their mapping and its pages.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from actors.weights.manifest import WeightManifest
from actors.weights.owned import WEIGHTS, hold, sweep
from actors.weights.staging import stage
from rlhf.errors import RunError

SHM = Path("/dev/shm")
GROW_BY = 64 << 20  # bytes; only the first publication grows the file


class ShmSender:
    """The policy's end. Rank 0 owns the file; the other ranks only take part in the gathering of weights."""

    def __init__(self, *, rank: int, dtype: torch.dtype, folder: Path = SHM) -> None:
        self.dtype = dtype
        self.file = ShmFile(folder) if rank == 0 else None

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Write the weights. None on ranks other than 0."""
        if self.file is None:
            for _ in named_weights:
                pass
            return None
        return stage(
            named_weights,
            self.file,
            version=version,
            dtype=self.dtype,
            transport="shm",
            fields={"path": str(self.file.path)},
        )

    def send(self, manifest: WeightManifest) -> None:
        """Nothing: the engines read the file."""

    def settle(self) -> None:
        """Nothing: the file is written again at the next sync."""

    def close(self) -> None:
        """Remove the file. Engines that have it mapped keep their pages."""
        if self.file is not None:
            self.file.close()


class ShmFile:
    """A locked file in shared memory that grows with what is written to it."""

    def __init__(self, folder: Path) -> None:
        sweep(folder)
        token = secrets.token_hex(8)
        aside = folder / f".{WEIGHTS}{token}"
        self.descriptor = hold(aside)
        self.path = aside.rename(folder / f"{WEIGHTS}{token}")  # locked before a sweep can see it
        self.flat = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> UInt8[Tensor, " bytes"]:
        """At least nbytes of the file, mapped. RunError if shared memory is full."""
        have = self.flat.numel()
        if nbytes > have:
            wanted = max(nbytes, have + GROW_BY)
            try:
                os.posix_fallocate(self.descriptor, have, wanted - have)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise RunError(_full(self.path.parent, wanted, have)) from error
            self.flat = torch.from_file(str(self.path), shared=True, size=wanted, dtype=torch.uint8)
        return self.flat

    def close(self) -> None:
        """Unlink and unlock; safe to call twice."""
        if self.descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1
            self.flat = torch.empty(0, dtype=torch.uint8)


def _full(folder: Path, wanted: int, have: int) -> str:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    return (
        f"weight sync: {folder} is full. The policy's weights want {wanted / 2**30:.2f} GiB or more, the file has "
        f"{have / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free. Enlarge it (mount -o remount,size=..., or "
        "--shm-size of the container), or use the gloo or nccl transport."
    )
