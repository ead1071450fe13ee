"""The policy's end of every transport: weights as one flat run of bytes, with the checksum of the run.

Iterating the weights may be a collective, so every rank iterates, and only rank 0 stores the weights. The sender must
never write to memory in use by an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from actors.weights.checksum import Checksum
from actors.weights.manifest import WeightManifest, aligned, buckets, dtype_name, tensor_view


class FlatMemory(Protocol):
    """Memory for a flat run of bytes. The memory need not hold the whole run at once."""

    def region(self, begin: int, end: int) -> UInt8[Tensor, " bytes"]:
        """Return the memory for the bytes from `begin` to `end` of the run."""


class Scratch:
    """Memory for one region at a time: the next region overwrites the last."""

    def __init__(self, device: torch.device) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8, device=device)

    def region(self, begin: int, end: int) -> UInt8[Tensor, " bytes"]:
        """Return the same memory for every region, as much as the largest region so far has needed."""
        if end - begin > self.flat.numel():
            self.flat = torch.empty(0, dtype=torch.uint8, device=self.flat.device)  # free it before the larger one
            self.flat = torch.empty(end - begin, dtype=torch.uint8, device=self.flat.device)
        return self.flat[: end - begin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where sender and receivers of a broadcast meet. The sender is rank 0; receivers are 1 to num_receivers."""

    address: str
    port: int
    num_receivers: int
    timeout_s: float  # until all have come, and of each broadcast


class WeightSender:
    """The policy's end of a transport, with an object on every rank. In a sync: publish, send, settle.

    In `publish` all ranks iterate the weights, in `send` all or no rank. beside_engine: an engine shares the GPU.
    """

    transport: ClassVar[str]
    memory: FlatMemory | None = None  # None: this rank stages no weights

    def __init__(self, *, rank: int, meeting: Meeting | None = None, beside_engine: bool = True) -> None:
        self.rank = rank
        self.meeting = meeting
        self.beside_engine = beside_engine

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Stage and describe the weights. Returns None on all ranks but 0."""
        if self.memory is None:
            iterate(named_weights)
            return None
        return stage(named_weights, self.memory, version=version, transport=self.transport, fields=self.fields())

    def fields(self) -> Mapping[str, Any]:
        """Return the values in the manifest that only the receiver of this transport reads."""
        return {}

    def send(self, manifest: WeightManifest, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Send the same weights while the engines receive, unless the engines read the weights by themselves."""

    def settle(self) -> None:
        """Free memory used only for the transfer. Called after the engines have loaded."""

    def close(self) -> None:
        """Free all resources of the transport."""


def iterate(named_weights: Iterable[tuple[str, Tensor]]) -> None:
    """Take part in the gathering of all weights, and keep none."""
    for _ in named_weights:
        pass


def stage(
    named_weights: Iterator[tuple[str, Tensor]],
    memory: FlatMemory,
    *,
    version: int,
    transport: str,
    fields: Mapping[str, Any],
) -> WeightManifest:
    """Copy the weights into `memory`, and describe them. Each weight is hashed while still in the CPU's cache."""
    staged: list[tuple[str, str, tuple[int, ...], int]] = []
    checksum = Checksum()
    end = 0
    for name, weight in named_weights:
        begin, end = end, end + aligned(weight.nbytes)
        region = memory.region(begin, end)
        _write(region, weight)
        checksum.add(region)
        staged.append((name, dtype_name(weight), tuple(weight.shape), begin))
    return WeightManifest(
        version=version,
        checksum=checksum.hexdigest(),
        names=tuple(name for name, *_ in staged),
        dtypes=tuple(dtype for _, dtype, *_ in staged),
        shapes=tuple(shape for *_, shape, _ in staged),
        offsets=tuple(offset for *_, offset in staged),
        nbytes=end,
        transport=transport,
        fields=fields,
    )


def staged_buckets(
    named_weights: Iterator[tuple[str, Tensor]], memory: Scratch, manifest: WeightManifest, *, limit: int
) -> Iterator[UInt8[Tensor, " bytes"]]:
    """Yield the run of a manifest in buckets of at most `limit` bytes, each valid until the next."""
    for first, last, begin, end in buckets(manifest.offsets, manifest.nbytes, limit=limit):
        bucket = memory.region(begin, end)
        for at in range(first, last):
            name, weight = next(named_weights)
            assert (name, tuple(weight.shape)) == (manifest.names[at], manifest.shapes[at])
            until = end if at + 1 == last else manifest.offsets[at + 1]
            _write(bucket[manifest.offsets[at] - begin : until - begin], weight)
        yield bucket
    iterate(named_weights)  # no weight is left, but the generator frees its resources only at the next request


def _write(region: UInt8[Tensor, " bytes"], weight: Tensor) -> None:
    """Fill a region with a weight and, up to the next boundary, with zeros."""
    tensor_view(region, 0, weight.dtype, weight.shape).copy_(weight.detach())
    region[weight.nbytes :].zero_()
