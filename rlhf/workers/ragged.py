"""Cutting flat columns into micro-batches within a hard token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf.data.packing import pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A micro-batch: rows of a ragged batch and where their tokens stand in its columns."""

    rows: tuple[int, ...]
    lengths: Int[Tensor, " b"]
    tokens: Int[Tensor, " n"]  # indices into the batch's columns


def slices(lengths: Sequence[int], rows: Sequence[int], *, max_tokens: int) -> list[Slice]:
    """The given rows of a batch in micro-batches of at most max_tokens tokens."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    found = []
    for members in pack([lengths[row] for row in rows], max_tokens=max_tokens):
        chosen = tuple(rows[member] for member in members)
        found.append(
            Slice(
                rows=chosen,
                lengths=torch.tensor([lengths[row] for row in chosen]),
                tokens=torch.cat([torch.arange(starts[row], starts[row + 1]) for row in chosen]),
            )
        )
    return found


def padded(found: Sequence[Slice], count: int) -> list[Slice]:
    """As many micro-batches as the other ranks have: what is missing is one token that nothing is learnt from."""
    empty = Slice(rows=(), lengths=torch.tensor([1]), tokens=torch.tensor([0]))
    return [*found, *[empty] * (count - len(found))]
