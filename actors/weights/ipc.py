"""Weights between processes with shared GPUs: an engine's worker opens the trainer's memory by CUDA handles.

Every rank next to an engine copies all weights to the shared GPU, and frees the copy once the engines have loaded. CUDA
frees the memory only after a receiver has opened and closed the handles, so a rank without an engine offers no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from actors.weights.manifest import WeightManifest
from actors.weights.staging import WeightSender


class IpcSender(WeightSender):
    """The end of one policy rank."""

    transport = "ipc"
    memory: DeviceParts | None = None

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Copy the weights to this rank's GPU and exchange handles. Returns None on all ranks but 0."""
        handles: list[Any] = [None] * dist.get_world_size()
        if self.beside_engine:
            self.memory = DeviceParts(torch.device("cuda", torch.cuda.current_device()))
        manifest = super().publish(named_weights, version)
        if self.memory is not None:
            torch.cuda.synchronize()
        dist.all_gather_object(handles, None if self.memory is None else self.memory.handles())
        if manifest is None or self.rank != 0:
            return None
        return replace(manifest, fields={"handles": dict(handle for handle in handles if handle is not None)})

    def settle(self) -> None:
        """Free the copied weights on this GPU."""
        self.memory = None
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self.settle()


class DeviceParts:
    """Memory on a GPU, with a part for each weight, since a gathered weight is valid only until the next weight."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: list[UInt8[Tensor, " bytes"]] = []

    def region(self, begin: int, end: int) -> UInt8[Tensor, " bytes"]:
        """Return new memory for the bytes from `begin` to `end`."""
        self.parts.append(torch.empty(end - begin, dtype=torch.uint8, device=self.device))
        return self.parts[-1]

    def handles(self) -> tuple[str, list[Any]]:
        """Return the GPU, and a handle of each part for receiving processes."""
        return gpu_uuid(self.device), [reduce_tensor(part)[1] for part in self.parts]


def gpu_uuid(device: torch.device) -> str:
    """Return the id of the physical GPU. The id does not depend on a process's CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(device).uuid)
