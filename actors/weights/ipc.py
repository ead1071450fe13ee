"""Weights between processes that share GPUs: the engine's worker opens the trainer rank's memory by its CUDA handles.

Every rank beside an engine lays all weights out on its own GPU, so the engine's worker finds them there. That memory is
given back once the engines have loaded: training wants it. CUDA gives back only what its receiver has opened and let
go, so a rank without an engine must not offer any.
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
from actors.weights.staging import stage


class IpcSender:
    """A policy rank's end."""

    def __init__(self, *, rank: int, dtype: torch.dtype, beside_engine: bool) -> None:
        self.rank = rank
        self.dtype = dtype
        self.beside_engine = beside_engine
        self.memory: DeviceParts | None = None

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Lay the weights out on this rank's GPU and exchange handles. None on ranks other than 0."""
        handles: list[Any] = [None] * dist.get_world_size()
        if not self.beside_engine:
            for _ in named_weights:
                pass
            dist.all_gather_object(handles, None)
            return None
        self.memory = DeviceParts(torch.device("cuda", torch.cuda.current_device()))
        manifest = stage(named_weights, self.memory, version=version, dtype=self.dtype, transport="ipc", fields={})
        torch.cuda.synchronize()
        dist.all_gather_object(handles, self.memory.handles())
        if self.rank != 0:
            return None
        return replace(manifest, fields={"handles": dict(handle for handle in handles if handle is not None)})

    def send(self, manifest: WeightManifest, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Nothing: the engines read the memory."""

    def settle(self) -> None:
        """Give the memory back."""
        self.memory = None
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """The same."""
        self.settle()


class DeviceParts:
    """A flat run on a GPU in parts of one weight each, since a gathered weight lives only until the next one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: list[UInt8[Tensor, " bytes"]] = []

    def region(self, begin: int, end: int) -> UInt8[Tensor, " bytes"]:
        """Return new memory for these bytes."""
        self.parts.append(torch.empty(end - begin, dtype=torch.uint8, device=self.device))
        return self.parts[-1]

    def handles(self) -> tuple[str, list[Any]]:
        """Return the GPU and, of each part, what another process opens it by."""
        return gpu_uuid(self.device), [reduce_tensor(part)[1] for part in self.parts]


def gpu_uuid(device: torch.device) -> str:
    """The physical GPU, by which processes with different CUDA_VISIBLE_DEVICES find each other."""
    return str(torch.cuda.get_device_properties(device).uuid)
