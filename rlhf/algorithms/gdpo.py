"""GDPO (arXiv:2601.05242): of several rewards each is compared within the group by itself, before they are summed."""

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
    """A reward counts by its weight, whatever its scale, and rewards of (1, 0) differ from (0, 1) in a group.

    Deviations from the paper: those of GRPO.
    """

    config: GDPOConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """The weighted sum of each reward against its group, normalised over the batch."""
        from rlhf.objectives.advantages import group_decoupled

        return group_decoupled(
            outcomes.by_reward,
            outcomes.weights,
            group_size=outcomes.group_size,
            eps=GROUP_STD_EPS,
            counted=outcomes.has_opinion,
        )

    def is_flat(self, outcomes: SequenceOutcomes) -> bool:
        """Whether the normalised rewards of every response add up to 0, whatever the sums of the plain ones are."""
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
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
