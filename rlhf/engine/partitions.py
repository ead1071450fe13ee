"""List the elements of the trained parameters that each rank updates, at every ZeRO stage, as divided by DeepSpeed.

The optimizer of a rank updates several float32 tensors, the masters. At stage 0 the masters are the parameters
themselves. At stages 1 and 2 the parameters of a group are joined, and each rank has an equal part of the whole. At
stage 3 each parameter is divided equally, and the parts of a group are joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Groups = Sequence[Mapping[str, int]]  # elements of each parameter by name, in the optimizer's order

SUB_GROUP_ELEMENTS = 10**9  # at stage 3, a rank's part of a group is split into masters of about this size
TENANT_STAGES = (0, 3)  # ZeRO stages at which tenants can share an engine (rlhf.engine.swapping)
_ALIGNMENT = 2  # at stages 1 and 2, the size of each part is a multiple of this number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The number of ranks and the ZeRO stage of a trained role."""

    ranks: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} at ZeRO stage {self.zero_stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Neighbouring elements of a flat parameter, and their place in a rank's masters."""

    parameter: str
    start: int  # index of the first element in the parameter
    numel: int
    master: int  # index of the master
    offset: int  # index of the first element in the master

    @property
    def end(self) -> int:
        return self.start + self.numel

    def within(self, begin: int, end: int) -> Piece:
        """Return the elements from `begin` to `end`, counted in the parameter."""
        return replace(self, start=begin, numel=end - begin, offset=self.offset + begin - self.start)


def elements(tensor: Tensor, piece: Piece) -> Tensor:
    """Return the elements of a piece in a master, or in a state of the same size. Nothing is copied."""
    return tensor.detach().view(-1).narrow(0, piece.offset, piece.numel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The elements of one rank, and the sizes of the masters. A padded master is larger than the sum of its pieces."""

    pieces: tuple[Piece, ...]
    sizes: tuple[int, ...]


def partitions_of(groups: Groups, sharding: Sharding) -> list[Partition]:
    divide = {0: _whole, 1: _of_joined_groups, 2: _of_joined_groups, 3: _of_each_parameter}[sharding.zero_stage]
    partitions = []
    for rank in range(sharding.ranks):
        pieces: list[Piece] = []
        sizes: list[int] = []
        for group in groups:
            for size, pieces_of_master in divide(group, len(sizes), rank, sharding.ranks):
                sizes.append(size)
                pieces += pieces_of_master
        partitions.append(Partition(pieces=tuple(pieces), sizes=tuple(sizes)))
    return partitions


_Masters = Iterator[tuple[int, list[Piece]]]  # size and pieces of each master of a group


def _whole(group: Mapping[str, int], master: int, rank: int, ranks: int) -> _Masters:
    for index, (name, numel) in enumerate(group.items(), start=master):
        yield numel, [Piece(parameter=name, start=0, numel=numel, master=index, offset=0)]


def _of_joined_groups(group: Mapping[str, int], master: int, rank: int, ranks: int) -> _Masters:
    size = -(-sum(group.values()) // (_ALIGNMENT * ranks)) * _ALIGNMENT
    first, at = rank * size, 0
    pieces = []
    for name, numel in group.items():
        begin, end = max(first, at), min(first + size, at + numel)
        if begin < end:
            start, offset = begin - at, begin - first
            pieces.append(Piece(parameter=name, start=start, numel=end - begin, master=master, offset=offset))
        at += numel
    yield size, pieces


def _of_each_parameter(group: Mapping[str, int], master: int, rank: int, ranks: int) -> _Masters:
    pieces: list[Piece] = []
    size = 0
    for name, numel in group.items():
        part = -(-numel // ranks)
        start = min(rank * part, numel)
        end = min(start + part, numel)
        if start < end:
            pieces.append(Piece(parameter=name, start=start, numel=end - start, master=master, offset=size))
        size += part
        if size >= SUB_GROUP_ELEMENTS:
            yield size, pieces
            pieces, size, master = [], 0, master + 1
    if size:
        yield size, pieces
