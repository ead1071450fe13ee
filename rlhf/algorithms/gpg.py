"""GPG (arXiv:2504.02546) is the policy gradient with a group baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.grpo import GROUP_STD_EPS
from rlhf.algorithms.shared import OnlineConfig, SequenceOutcomes, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class GPGConfig(OnlineConfig):
    """Group policy gradient: no ratio, no clip, no penalty."""

    name: Literal["gpg"]
    """The algorithm."""
    std_normalize: bool = False
    """Divide the centred scores by their group's standard deviation."""


class GPG(WithoutCritic):
    """Centred scores are multiplied by num_groups / num_groups_with_unequal_scores, so that flat groups dilute no
    gradient.

    Deviation from the paper: the factor is computed over the step's whole batch, not over one minibatch.
    """

    def __init__(self, config: GPGConfig) -> None:
        self.config = config

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the scores minus their group's mean, scaled."""
        from rlhf.objectives.advantages import group_centered, group_normalized, uneven_group_scale

        scores, group_size = outcomes.scores, outcomes.group_size
        scale = uneven_group_scale(scores, group_size=group_size)
        if self.config.std_normalize:
            return scale * group_normalized(scores, group_size=group_size, eps=GROUP_STD_EPS)
        return scale * group_centered(scores, group_size=group_size)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import composed_loss, unweighted

        return composed_loss(self.config, batch, counts, unweighted(batch), kl_coef=kl_coef)
