"""The description of published weights: names, layout, version and checksum.

All transports use the same layout: one flat run of bytes in the order of the trainer's names, each tensor at a 64-byte
boundary. The checksum covers the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, and what vectorised loads like


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """One published set of weights. Picklable, a few kilobytes, holds no tensor. Files have no layout here."""

    version: int
    checksum: str  # of the nbytes of the flat run: see Checksum
    names: tuple[str, ...] = ()  # Hugging Face names
    dtypes: tuple[str, ...] = ()  # torch's names, e.g. "bfloat16"
    shapes: tuple[tuple[int, ...], ...] = ()
    offsets: tuple[int, ...] = ()  # bytes from the start of the flat run
    nbytes: int = 0
    transport: str
    fields: Mapping[str, Any]  # additional values for this transport's receiver

    def views(
        self, flat: UInt8[Tensor, " bytes"], first: int = 0, last: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights from `first` until `last` as views of `flat`, the memory that begins with `first`."""
        for i in range(first, len(self.names) if last is None else last):
            begin = self.offsets[i] - self.offsets[first]
            yield self.names[i], tensor_view(flat, begin, getattr(torch, self.dtypes[i]), self.shapes[i])


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def aligned(nbytes: int) -> int:
    """Return the next 64-byte boundary."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def tensor_view(flat: UInt8[Tensor, " bytes"], offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor as a view of the flat memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    return flat[offset : offset + nbytes].view(dtype).view(tuple(shape))


def buckets(offsets: Sequence[int], nbytes: int, *, limit: int) -> list[tuple[int, int, int, int]]:
    """Split the run into buckets of whole tensors, at most `limit` bytes each unless a single tensor is larger.

    A bucket is (first tensor, end of the tensors, first byte, end of the bytes), with exclusive ends.
    """
    ends = [*offsets[1:], nbytes]
    runs: list[tuple[int, int, int, int]] = []
    first = 0
    for index in range(1, len(offsets) + 1):
        if index == len(offsets) or ends[index] - offsets[first] > limit:
            runs.append((first, index, offsets[first], ends[index - 1]))
            first = index
    return runs
