"""Convert padded [B, T] arrays of libraries to flat columns with lengths, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.masking import to_tokens


class Layout:
    """Where the tokens of a padded batch stand in flat columns. Trailing padding is dropped or kept; holes stay."""

    def __init__(self, mask: Tensor, *, keep_padding: bool = False) -> None:
        self.width = mask.shape[1]
        columns = torch.arange(1, self.width + 1)
        there = torch.ones_like(mask) if keep_padding else mask
        self.lengths = torch.where(there, columns, 0).amax(1) if self.width else mask.sum(1)
        self._kept = columns <= self.lengths[:, None]
        self.mask = mask[self._kept]

    @classmethod
    def full(cls, shape: torch.Size) -> Layout:
        """Return all positions, padding included, as sampled tokens: for sources without a mask."""
        return cls(torch.ones(shape, dtype=torch.bool))

    def flat(self, padded: Tensor) -> Tensor:
        """[B, T] to [N]."""
        return padded[self._kept]

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[B] to [N]."""
        return to_tokens(per_sequence, self.lengths, num_tokens=len(self.mask))

    def padded(self, flat: Tensor) -> Tensor:
        """[N] to [B, T], zeros (False) in the padding."""
        return flat.new_zeros(self._kept.shape).masked_scatter(self._kept, flat)


def carried_back(padded: Tensor, mask: Tensor) -> Tensor:
    """Give each masked position the value of the next sampled position, or zero at the end."""
    result = padded.clone()
    following = torch.zeros_like(padded[:, 0])
    for t in reversed(range(padded.shape[1])):
        following = torch.where(mask[:, t], padded[:, t], following)
        result[:, t] = following
    return result


def gradient(loss: Tensor, variable: Tensor) -> Tensor:
    """Return d loss / d variable, zeros without a dependence."""
    (found,) = torch.autograd.grad(loss, variable, retain_graph=True, allow_unused=True)
    return torch.zeros_like(variable) if found is None else found
