"""GDPO (arXiv:2601.05242) normalises each reward within the group before it sums them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.grpo import FLAT_BELOW, GROUP_STD_EPS, GroupRelative
from rlhf.algorithms.shared import ClippedConfig, LossKLConfig, SequenceOutcomes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class GDPOConfig(ClippedConfig):
    """Group reward-decoupled normalisation policy optimisation."""

    name: Literal["gdpo"]
    """The algorithm."""
    kl: LossKLConfig = LossKLConfig()
    """Penalty towards the reference model."""


class GDPO(GroupRelative):
    """A reward counts by its weight, independent of its scale. Rewards of (1, 0) differ from (0, 1) in a group.

    Deviations from the paper: the same as GRPO's.
    """

    config: GDPOConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the weighted sum of the rewards, each normalised in its group, normalised over the batch."""
        from rlhf.objectives.advantages import group_decoupled

        return group_decoupled(
            outcomes.by_reward,
            outcomes.weights,
            group_size=outcomes.group_size,
            eps=GROUP_STD_EPS,
            counted=outcomes.has_opinion,
        )

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether the weighted sum of normalised rewards is 0 for every response. The sums of the plain rewards may
        differ."""
        from rlhf.objectives.advantages import group_normalized_sum

        sums = group_normalized_sum(
            outcomes.by_reward,
            outcomes.weights,
            group_size=outcomes.group_size,
            eps=GROUP_STD_EPS,
            counted=outcomes.has_opinion,
        )
        return bool((sums.abs() < FLAT_BELOW).all())

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
