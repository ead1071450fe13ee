"""Sums, means and moments over the tokens that count.

Read by every other module of this package: flat columns `[N]` of B sequences with `lengths[B]` (rlhf.types), and
bool masks in which True counts. Never multiplies by a mask: `nan * 0` is `nan`, so masked entries are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def masked_sum(values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Sum of the values that count."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Mean of the values that count; 0 if none does, for a micro-batch may hold none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def bin_counts(values: Float[Tensor, " N"], mask: Bool[Tensor, " N"], *, edges: Sequence[float]) -> Float[Tensor, " K"]:
    """How many of the values that count lie in each of the K bins between K + 1 edges, as
    rlhf.tracking.metrics.reductions' Histogram counts them."""
    inner = torch.tensor(edges[1:-1], dtype=values.dtype, device=values.device)
    bins = len(edges) - 1
    place = torch.where(mask & ~values.isnan(), torch.bucketize(values, inner, right=True), bins)
    return torch.bincount(place, minlength=bins + 1)[:bins].double()


def sequence_sums(values: Float[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Sum of each sequence's tokens. It does not depend on what else is in the batch, bit for bit."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0)


def sequence_maxima(values: Float[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Largest token of each sequence; -inf for an empty one."""
    return torch.segment_reduce(values, "max", lengths=lengths, axis=0, initial=-torch.inf)


def sequence_counts(mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Tokens of each sequence that count."""
    running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    ends = lengths.cumsum(0)
    return running[ends] - running[ends - lengths]


def sequence_means(
    values: Float[Tensor, " N"], mask: Bool[Tensor, " N"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Mean over each sequence's tokens that count; 0 for a sequence without any."""
    return sequence_sums(torch.where(mask, values, 0.0), lengths) / sequence_counts(mask, lengths).clamp(min=1)


def through_first(marks: Bool[Tensor, "*B T"]) -> Bool[Tensor, "*B T"]:
    """Up to each row's first mark, that one too; all of a row without any. Of right-padded responses with their end
    tokens marked, the tokens that were sampled."""
    return marks.cumsum(-1) - marks.long() == 0


def to_tokens(
    per_sequence: Shaped[Tensor, " B"], lengths: Int[Tensor, " B"], *, num_tokens: int
) -> Shaped[Tensor, " N"]:
    """Repeat one entry a sequence over its tokens. `num_tokens` is N: knowing it, a GPU need not be waited for."""
    return per_sequence.repeat_interleave(lengths, output_size=num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and summed squared deviation from it: what ranks exchange to whiten over all of their tokens.

    Unlike (sum, sum of squares, count) it loses no digits when the mean is large beside the spread.
    """

    count: int
    mean: float
    squared_deviation: float

    @property
    def variance(self) -> float:
        """Unbiased (count - 1 in the denominator). ValueError if fewer than two values count."""
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 values, got {self.count}")
        return self.squared_deviation / (self.count - 1)

    @property
    def biased_variance(self) -> float:
        """The mean squared deviation (count in the denominator). ValueError if no value counts."""
        if self.count < 1:
            raise ValueError("a variance of no values")
        return self.squared_deviation / self.count


def moments(values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"]) -> Moments:
    """Moments of the values that count, in float64 whatever the input. One wait for the device."""
    kept = values[mask].double()
    if kept.numel() == 0:
        return Moments(count=0, mean=0.0, squared_deviation=0.0)
    mean = kept.mean()
    return Moments(count=kept.numel(), mean=mean.item(), squared_deviation=(kept - mean).square().sum().item())


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of the union (Chan, Golub and LeVeque 1983). Every rank must pass the same order."""
    total = Moments(count=0, mean=0.0, squared_deviation=0.0)
    for part in parts:
        count = total.count + part.count
        if count == 0:
            continue
        delta = part.mean - total.mean
        total = Moments(
            count=count,
            mean=total.mean + delta * part.count / count,
            squared_deviation=total.squared_deviation
            + part.squared_deviation
            + delta * delta * total.count * part.count / count,
        )
    return total
