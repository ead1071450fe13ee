"""One rank of a policy trained on a batch in portions (train.streamed).

    portion -> prepare -> advantages -> gradient, for each portion; then the optimizer step

The gradient of a portion is added before the next portion has arrived. The divisors of the loss are not known yet.
Losses are therefore sums, and the optimizer step divides the gradient. Given responses come last, when the divisor is
known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rlhf.roles import Metrics, SequenceReport
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.types import BatchPlan, GivenBatch, OwnLoss, PrivilegedPrompts, Rollouts, TokenSignals, TokenValues
from rlhf.workers.microbatches import padded
from rlhf.workers.online.given import given_minibatch
from rlhf.workers.online.normalisation import Normalisation
from rlhf.workers.online.policy import PolicyWorker, PreparedShare


class StreamedPolicyWorker(PolicyWorker):
    """Sums the gradients of portions. The first `num_accumulated` portions are in the sum."""

    portions: list[PreparedShare]

    def prepare(
        self, plan: BatchPlan, *parts: Rollouts | TokenValues | PrivilegedPrompts
    ) -> tuple[tuple[SequenceReport, ...], Metrics]:
        if plan.portion == 0:
            self.portions, self.num_accumulated = [], 0
            self.measured: list[Metrics] = []  # metrics of the portions in the sum
        result = super().prepare(plan, *parts)
        self.portions.append(self.prepared)
        return result

    def forward_backward(
        self, minibatch: int, given: GivenBatch | None = None, *, ends: bool = True, loss: OwnLoss | None = None
    ) -> Metrics:
        """Add the newest portions of a minibatch to the sum. Return the metrics of all portions at the end. Collective.

        Portions without a trained token wait for a portion with trained tokens: there may be no optimizer step.
        """
        assert loss is None, "rlhf.start refuses streamed batches"
        if not ends:
            if self._normalisation(minibatch, self.portions[self.num_accumulated :]).counts.num_tokens:
                self._accumulate(minibatch, ends=False)
            return {}
        normalisation = self._normalisation(minibatch, self.portions)
        if not normalisation.counts.num_tokens:
            return self.without_tokens()
        learned, weight = given_minibatch(given, self.split), 1.0 if given is None else 1.0 - given.share
        self._accumulate(minibatch, ends=learned is None)
        if learned is not None:
            compute = partial(self.given_loss, learned, scale=normalisation.divisor / weight)
            self.measured += self.accumulate_gradient(learned.microbatches, compute, ends=True)
        parts, self.measured, self.num_accumulated = self.measured, [], 0
        for portion in self.portions:
            portion.observes = False
        self.divisor = normalisation.divisor / weight
        return merge_metrics(map(normalisation.measured, parts))

    def token_signals(self, sequences: Sequence[int]) -> tuple[TokenSignals, int]:
        signals = TokenSignals.joined([self.signals(portion, sequences) for portion in self.portions])
        return signals, len(signals.advantages)

    def _normalisation(self, minibatch: int, portions: Sequence[PreparedShare]) -> Normalisation:
        counts = self.counts(*(portion.share.plan.minibatches[minibatch] for portion in portions))
        return Normalisation(counts=counts, mode=self.algorithm.config.aggregation, is_deferred=True)

    def _accumulate(self, minibatch: int, *, ends: bool) -> None:
        """Run a minibatch's passes over the portions missing in the sum. ends: the step follows. Collective."""
        normalisation = self._normalisation(minibatch, self.portions)
        left = [(portion, portion.share.microbatches[minibatch]) for portion in self.portions[self.num_accumulated :]]
        if ends and not (left and left[-1][1]):
            left.append((self.portions[-1], tuple(padded((), 1))))  # a pass must mark the end of the gradient
        for index, (portion, microbatches) in enumerate(left):
            compute = partial(self.loss, portion, normalisation)
            self.measured += self.accumulate_gradient(microbatches, compute, ends=ends and index == len(left) - 1)
        self.num_accumulated = len(self.portions)
