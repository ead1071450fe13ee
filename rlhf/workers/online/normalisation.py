"""Divide the losses of an optimizer step by counts over all ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf.algorithms.microbatch import StepCounts
from rlhf.objectives.aggregation import Aggregation, denominator
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Mean

LOSSES = ("update/loss/mean", "update/policy_loss/mean", "update/kl_loss/mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Divides the loss of each micro-batch or, if gradients come before the counts are known, their sum in the end."""

    counts: StepCounts  # counts of the step; if deferred, of the portions so far
    mode: Aggregation
    is_deferred: bool = False

    @property
    def of_losses(self) -> StepCounts:
        """Return the divisors for the loss of a micro-batch."""
        return replace(self.counts, num_tokens=1, num_sequences=1) if self.is_deferred else self.counts

    @property
    def divisor(self) -> int:
        """Return the divisor for the sum of the gradients."""
        counts = self.counts
        if not self.is_deferred:
            return 1
        return denominator(self.mode, num_tokens=counts.num_tokens, num_sequences=counts.num_sequences)

    def measured(self, metrics: Metrics) -> Metrics:
        """Return the metrics of a micro-batch as after an earlier division of the loss."""
        factor = self.counts.num_tokens / self.of_losses.num_tokens / self.divisor
        return {
            name: replace(value, total=value.total * factor) if name in LOSSES and isinstance(value, Mean) else value
            for name, value in metrics.items()
        }
