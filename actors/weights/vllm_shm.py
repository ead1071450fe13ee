"""The engine's end of the shared-memory transport, inside vLLM's workers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from actors.weights.checksum import Checksum
from actors.weights.manifest import named_views
from actors.weights.vllm_reload import ReloadEngine


@dataclass
class ShmInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Empty: sender and receiver agree on nothing beforehand."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The fields of the manifest, for the shm transport."""

    version: int
    checksum: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    path: str


class ShmEngine(ReloadEngine[ShmInit, ShmUpdate]):
    """Reads the memory in place. It stays mapped from one sync to the next."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mapped = ("", 0, 0)  # path, inode and size of the memory that `flat` maps
        self.flat = torch.empty(0, dtype=torch.uint8)

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        """Do nothing: the path arrives with each update."""

    def receive_weights(self, update_info: ShmUpdate) -> None:
        """Load every tensor out of the mapped memory, and at the same time take the checksum of its bytes."""
        u = update_info
        published = (u.path, os.stat(u.path).st_ino, u.nbytes)  # another process may come to have the same path
        if published != self.mapped:
            self.flat = torch.from_file(u.path, shared=True, size=u.nbytes, dtype=torch.uint8)
            self.mapped = published
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-hash") as hashing:
            checksum = Checksum()
            added = hashing.submit(checksum.add, self.flat)
            self.load(named_views(self.flat, u.names, u.dtypes, u.shapes, u.offsets))
        added.result()
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        """Unmap the trainer's shared memory."""
        self.mapped, self.flat = ("", 0, 0), torch.empty(0, dtype=torch.uint8)
