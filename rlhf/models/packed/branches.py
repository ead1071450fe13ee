"""Sequences sharing the computation of common first tokens.

In a packed row a sequence may be a branch: a branch continues the first tokens of an earlier sequence of the row (the
trunk) instead of repeating these tokens. A trunk may be a branch itself, so the sequences of a row form trees of any
depth. The hidden states of shared tokens are computed once, every branch attends to the shared states, and the gradient
of a shared state is the sum over the branches: the same mathematics as with copies, up to rounding.

Example: the prompt `p q` with the responses `a b` and `c`, and `d` after `p q c`, in a row of 6 tokens:
    tokens = [p q a b | c | d]   lengths = [4, 1, 1]   branches = [None, Branch(of=0, length=2), Branch(of=1, length=3)]
    positions = [0 1 2 3 | 2 | 3]   predecessors = [-1 0 1 2 | 1 | 4]   trunks = [(), ((0, 2),), ((0, 2), (1, 1))]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """A sequence continuing the first `length` tokens of the whole sequence `of`, which is earlier in the row.

    `of` holds the last shared tokens in the row. If `of` is a branch itself, the trunk of `of` holds the first tokens.
    """

    of: int
    length: int


Branches = Sequence[Branch | None]  # one entry per sequence; None: the row holds all tokens of the sequence


def positions(lengths: Sequence[int], branches: Branches | None, *, device: torch.device) -> Int[Tensor, " N"]:
    """Return each token's position in the token's whole sequence."""
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
            first[index] = starts[branch.of] + _num_held(branch, branches) - 1
    return before.index_copy(0, starts, first)


def trunks(lengths: Sequence[int], branches: Branches | None) -> list[tuple[tuple[int, int], ...]]:
    """Return for each sequence where the row holds the shared tokens before the sequence.

    An entry (sequence, count) stands for the first `count` tokens of an earlier sequence in the row.
    """
    result: list[tuple[tuple[int, int], ...]] = []
    for branch in branches or [None] * len(lengths):
        count = 0 if branch is None else _num_held(branch, branches)
        held = 0 if branch is None else lengths[branch.of]
        if branch is not None and not 0 < count <= held:
            raise ValueError(f"{branch} does not end in the {held} tokens which the row holds of its trunk")
        result.append(() if branch is None else (*result[branch.of], (branch.of, count)))
    return result


def _num_held(branch: Branch, branches: Branches | None) -> int:
    """Count the shared tokens that the row holds of the branch's trunk. The trunk of the trunk holds the rest."""
    trunk = None if branches is None else branches[branch.of]
    return branch.length - (0 if trunk is None else trunk.length)
