"""REINFORCE++ (arXiv:2501.03262) whitens the rewards to come over the whole batch, without a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf.algorithms.shared import ClippedConfig, RewardKLConfig, RewardsToGo, SequenceOutcomes, StepUse

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class ReinforcePlusPlusConfig(ClippedConfig):
    """REINFORCE with the batch as its baseline, and PPO's clip."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["reinforce_plus_plus"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    group_baseline: bool = False
    """Take the mean of its prompt's group off each score first (the paper's REINFORCE++-baseline)."""


class ReinforcePlusPlus(RewardsToGo):
    """A token's advantage is the score minus the KL penalties from it on, whitened over the batch's sampled tokens.

    With group_baseline all tokens of a response have one advantage. Deviation from the paper's baseline form: its KL
    penalty is the configured one, not always a k2 term of the loss. Set kl.place and kl.estimator to match the paper.
    """

    whitens = True

    def __init__(self, config: ReinforcePlusPlusConfig) -> None:
        self.config = config

    @property
    def compares_responses(self) -> bool:
        """Whether there is a group baseline."""
        return self.config.group_baseline

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"] | None:
        """Return each score minus its group's mean, or None if advantages are per token."""
        from rlhf.objectives.advantages import group_centered

        return group_centered(outcomes.scores, group_size=outcomes.group_size) if self.config.group_baseline else None

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
