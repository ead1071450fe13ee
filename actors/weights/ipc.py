"""Weights between processes that share GPUs: the engine's worker opens the trainer rank's memory by its CUDA handles.

Every rank beside an engine lays all weights out on its own GPU, so the engine's worker finds them there. That memory is
given back once the engines have loaded: training wants it. CUDA gives back only what its receiver has opened and let
go, so a rank without an engine must not offer any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import xxhash
from jaxtyping import UInt8
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from actors.weights.manifest import WeightManifest, aligned, tensor_view


class IpcSender:
    """A policy rank's end."""

    def __init__(self, *, rank: int, dtype: torch.dtype, beside_engine: bool) -> None:
        self.rank = rank
        self.dtype = dtype
        self.beside_engine = beside_engine
        self.parts: list[UInt8[Tensor, " bytes"]] = []

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Lay the weights out on this rank's GPU and exchange handles. None on ranks other than 0."""
        handles: list[Any] = [None] * dist.get_world_size()
        if not self.beside_engine:
            for _ in named_weights:
                pass
            dist.all_gather_object(handles, None)
            return None
        device = torch.device("cuda", torch.cuda.current_device())
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        offsets: list[int] = []
        end = 0
        self.parts = []
        for name, weight in named_weights:  # a gathered weight lives only until the next one, so it is copied
            part = torch.zeros(aligned(weight.numel() * self.dtype.itemsize), dtype=torch.uint8, device=device)
            tensor_view(part, 0, self.dtype, weight.shape).copy_(weight.detach())
            self.parts.append(part)
            names.append(name)
            shapes.append(tuple(weight.shape))
            offsets.append(end)
            end += part.numel()
        torch.cuda.synchronize()
        dist.all_gather_object(handles, (gpu_uuid(device), [reduce_tensor(part)[1] for part in self.parts]))
        if self.rank != 0:
            return None
        return WeightManifest(
            version=version,
            checksum=device_checksum(self.parts),
            names=tuple(names),
            dtypes=(str(self.dtype).removeprefix("torch."),) * len(names),
            shapes=tuple(shapes),
            offsets=tuple(offsets),
            nbytes=end,
            transport="ipc",
            fields={"handles": dict(handle for handle in handles if handle is not None)},
        )

    def send(self, manifest: WeightManifest) -> None:
        """Nothing: the engines read the memory."""

    def settle(self) -> None:
        """Give the memory back."""
        self.parts = []
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """The same."""
        self.settle()


def device_checksum(parts: Iterable[UInt8[Tensor, " bytes"]]) -> str:
    """xxh3-64 of memory on a GPU, by way of the host."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def gpu_uuid(device: torch.device) -> str:
    """The physical GPU, by which processes with different CUDA_VISIBLE_DEVICES find each other."""
    return str(torch.cuda.get_device_properties(device).uuid)
