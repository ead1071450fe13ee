"""Convert padded [B, T] arrays of libraries to flat columns with lengths, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.masking import sequence_counts, sequence_means, to_tokens


class Layout:
    """Where the tokens of a padded batch stand in flat columns. Trailing padding is dropped; holes stay."""

    def __init__(self, mask: Tensor) -> None:
        self.width = mask.shape[1]
        columns = torch.arange(1, self.width + 1)
        self.lengths = torch.where(mask, columns, 0).amax(1)
        self._kept = columns <= self.lengths[:, None]
        self.mask = mask[self._kept]

    @classmethod
    def full(cls, shape: torch.Size) -> Layout:
        """Return all positions, padding included, as sampled tokens: for sources without a mask."""
        return cls(torch.ones(shape, dtype=torch.bool))

    @property
    def counts(self) -> Tensor:
        return sequence_counts(self.mask, self.lengths)

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


def clip_metrics(low: Tensor, high: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return TRL's fractions of tokens whose gradient the clip stops, in float32, and their extremes by sequence."""
    flags = {"low": low.float(), "high": high.float(), "region": (low | high).float()}
    least, most = (sequence_means(flags[side], layout.mask, layout.lengths) for side in ("low", "high"))
    return {
        **{f"clip_ratio/{side}_mean": flag[layout.mask].mean() for side, flag in flags.items()},
        "clip_ratio/low_min": least.min(),
        "clip_ratio/high_max": most.max(),
    }
