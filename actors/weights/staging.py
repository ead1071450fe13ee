"""The trainer's half of every transport: all weights into one flat run of host memory, hashed as they are copied.

Runs in the policy's process. Iterating the weights may be a collective, so every rank calls `stage`; only rank 0 keeps
what it is given. It must never be called while an engine still reads the previous version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import xxhash
from jaxtyping import UInt8
from torch import Tensor

from actors.weights.manifest import WeightManifest, aligned, tensor_view


class FlatMemory(Protocol):
    """Host memory that may grow and keeps its content when it does."""

    def reserve(self, nbytes: int) -> UInt8[Tensor, " bytes"]:
        """The memory, at least that large. Growing it ends the life of earlier views."""
        ...


def stage(
    named_weights: Iterator[tuple[str, Tensor]],
    memory: FlatMemory,
    *,
    version: int,
    dtype: torch.dtype,
    transport: str,
    fields: Mapping[str, Any],
) -> WeightManifest:
    """Copy the weights, converted to `dtype`, into `memory` and describe them.

    Each tensor is hashed straight after its copy, while it is still in the cache.
    """
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []
    digest = xxhash.xxh3_64()
    end = 0
    for name, weight in named_weights:
        nbytes = weight.numel() * dtype.itemsize
        begin, end = end, end + aligned(nbytes)
        flat = memory.reserve(end)
        tensor_view(flat, begin, dtype, weight.shape).copy_(weight.detach())
        flat[begin + nbytes : end].zero_()
        digest.update(flat[begin:end].numpy().data)
        names.append(name)
        shapes.append(tuple(weight.shape))
        offsets.append(begin)
    return WeightManifest(
        version=version,
        checksum=digest.hexdigest(),
        names=tuple(names),
        dtypes=(str(dtype).removeprefix("torch."),) * len(names),
        shapes=tuple(shapes),
        offsets=tuple(offsets),
        nbytes=end,
        transport=transport,
        fields=fields,
    )
