"""Responses sharing the computation of their prompt.

In a packed row a sequence may be a branch: it continues the first tokens of another sequence of the row (its trunk)
instead of repeating them. The prompt's hidden states are then computed once, every branch attends to them, and their
gradient is the sum over the branches: the same mathematics as with copies, up to rounding.

Example: the prompt `p q` with the responses `a b` and `c`, in a row of 5 tokens:
    tokens = [p q a b | c]   lengths = [4, 1]   branches = [None, Branch(of=0, length=2)]
    positions = [0 1 2 3 | 2]   predecessors = [-1 0 1 2 | 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """A sequence continuing the first `length` tokens of sequence `of`, an earlier sequence without a trunk."""

    of: int
    length: int


Branches = Sequence[Branch | None]  # one entry per sequence; None: the sequence holds all of its tokens


def positions(lengths: Sequence[int], branches: Branches | None, *, device: torch.device) -> Int[Tensor, " N"]:
    """Return each token's position in its whole sequence."""
    return torch.cat(
        [
            torch.arange(length, device=device) + (0 if branch is None else branch.length)
            for length, branch in zip(lengths, branches or [None] * len(lengths), strict=True)
        ]
    )


def predecessors(lengths: Int[Tensor, " B"], branches: Branches | None) -> Int[Tensor, " N"]:
    """Return the row index of the token before each token, or -1 for the first token of a sequence without a trunk."""
    starts = lengths.cumsum(0) - lengths
    before = torch.arange(int(lengths.sum()), device=lengths.device) - 1
    first = torch.full_like(starts, -1)
    for index, branch in enumerate(branches or ()):
        if branch is not None:
            first[index] = starts[branch.of] + branch.length - 1
    return before.index_copy(0, starts, first)
