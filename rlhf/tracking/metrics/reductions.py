"""How a metric's values add up over micro-batches, ranks and updates: sums and counts travel, never ready-made means.

A worker returns reductions, the controller merges them in rank order and takes the results once per step. Merging is
associative, so any split of the same values gives the same result up to float rounding. No tensors, no names here.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

_LARGEST_LOG = 709.0  # exp of more is no float


class Reduction(ABC):
    """The values of one metric so far. Immutable; `merge` combines the values of both operands."""

    __slots__ = ()

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return the reduction over the values of both operands."""

    @abstractmethod
    def result(self) -> float:
        """Return the metric's value, or nan if undefined (the mean of nothing)."""


class _Additive(Reduction):
    """A reduction with field-by-field merging: numbers add up, also in tuples, and reductions merge."""

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self)(**{f.name: _add(getattr(self, f.name), getattr(other, f.name)) for f in fields})


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, tuple):
        return tuple(_add(a, b) for a, b in zip(left, right, strict=True))
    return left.merge(right) if isinstance(left, Reduction) else left + right


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(_Additive):
    """Arithmetic mean; also a fraction (`total` counts the cases) and a ratio of two sums."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(total=math.fsum(values), count=len(values))

    def result(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpMean(Mean):
    """exp of the mean: of negative log-probabilities a perplexity."""

    def result(self) -> float:
        mean = super(ExpMean, self).result()
        return math.exp(mean) if mean < _LARGEST_LOG else math.inf if mean == mean else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceOfMeans(_Additive):
    """A mean minus a second mean, each over separate cases. nan if a mean has no cases."""

    left: Mean
    right: Mean

    def result(self) -> float:
        return self.left.result() - self.right.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationError(_Additive):
    """Mean over cases of |accuracy - mean confidence| in the case's bin (arXiv:1706.04599, eq. 3): 0 is calibrated.

    Bins are (cases, summed confidence, right cases), with equal edges in both operands of a merge.
    """

    bins: tuple[tuple[float, float, float], ...]

    def result(self) -> float:
        cases = sum(count for count, _, _ in self.bins)
        gaps = sum(abs(right - confidence) for _, confidence, right in self.bins)
        return gaps / cases if cases else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(_Additive):
    """Sum, or number of cases. The sum of nothing is 0."""

    total: float

    def result(self) -> float:
        return self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen(Reduction):
    """A reduction to the value of one operand."""

    value: float

    def result(self) -> float:
        return self.value


class Last(_Chosen):
    """State rather than a sample of something (a learning rate, a version): the right operand wins."""

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        return other


class Max(_Chosen):
    """Largest value; a nan among the values is kept."""

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        return self if math.isnan(self.value) or self.value >= other.value else other


class Min(_Chosen):
    """Smallest value; a nan among the values is kept."""

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        return self if math.isnan(self.value) or self.value <= other.value else other


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveShare(_Additive):
    """Effective sample size of weighted cases, as a fraction: (sum of w)^2 / (cases * sum of w^2) (Kish 1965).

    The share is 1 for equal weights, 1 / cases for a single nonzero weight, and nan without cases.
    """

    total: float
    squares: float
    count: float

    def result(self) -> float:
        return self.total * self.total / (self.count * self.squares) if self.count * self.squares else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Std(Reduction):
    """Population standard deviation, kept as count, mean and M2 = sum of (x - mean)^2.

    Merged by the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances" (1979). The update does not cancel if the mean is large compared with the deviation.
    """

    count: float
    mean: float
    m2: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        if not values:
            return cls(count=0, mean=0.0, m2=0.0)
        mean = math.fsum(values) / len(values)
        return cls(count=len(values), mean=mean, m2=math.fsum((x - mean) ** 2 for x in values))

    def merge(self, other: Self) -> Self:
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
        )

    def result(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedVariance(_Additive):
    """1 - var(target - prediction) / var(target): 1 is perfect, 0 no better than the mean; nan for a constant target.

    Not a mean of per-rank values: both variances are taken over all values, then divided.
    """

    target: Std
    residual: Std  # of target - prediction, over the same values

    def result(self) -> float:
        return 1.0 - self.residual.m2 / self.target.m2 if self.target.m2 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad(_Additive):
    """The choices of each expert of a mixture, by layer. The result is max / mean of a layer, mean over layers."""

    layers: tuple[tuple[float, ...], ...]

    def result(self) -> float:
        measured = [self._of_layer(loads, sum(loads)) for loads in self.layers if sum(loads)]
        return math.fsum(measured) / len(measured) if measured else math.nan

    def _of_layer(self, loads: tuple[float, ...], total: float) -> float:
        return max(loads) * len(loads) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEntropy(ExpertLoad):
    """The entropy of a layer's choices divided by log(experts), mean over layers: 1 is even, 0 is a single expert."""

    def _of_layer(self, loads: tuple[float, ...], total: float) -> float:
        shares = [load / total for load in loads if load]
        return -math.fsum(share * math.log(share) for share in shares) / math.log(len(loads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(Reduction):
    """Numbers of values between fixed edges. Both operands of a merge have the same edges.

    A value at an edge is counted above the edge. A value beyond the outer edges is counted in the nearest bin. nan is
    not counted.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]  # one fewer than edges

    @classmethod
    def of(cls, values: Sequence[float], *, edges: tuple[float, ...]) -> Self:
        last, counts = len(edges) - 2, [0.0] * (len(edges) - 1)
        for value in values:
            if not math.isnan(value):
                counts[min(max(bisect_right(edges, value) - 1, 0), last)] += 1.0
        return cls(edges=edges, counts=tuple(counts))

    def merge(self, other: Self) -> Self:
        if self.edges != other.edges:
            raise ValueError(f"histograms of {len(self.counts)} and {len(other.counts)} bins have different edges")
        return type(self)(edges=self.edges, counts=_add(self.counts, other.counts))

    def result(self) -> float:
        """Return the number of values; the metric itself is the whole histogram."""
        return math.fsum(self.counts)
