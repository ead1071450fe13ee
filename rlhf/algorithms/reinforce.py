"""REINFORCE (Williams 1992) weights log-probabilities by the rewards to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.shared import OnlineConfig, RewardKLConfig, RewardsToGo, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class ReinforceConfig(OnlineConfig):
    """The plain policy gradient. It needs one optimizer step per batch, because no ratio corrects for older weights."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["reinforce"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token."""
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    """Baseline of the rewards to come: their mean over the batch's sampled tokens, or none."""


class Reinforce(RewardsToGo):
    """A token's advantage is the discounted score minus the KL penalties from the token on, minus the baseline."""

    compares_responses = False

    def __init__(self, config: ReinforceConfig) -> None:
        self.config = config
        self.discount = config.gamma

    @property
    def centers(self) -> bool:
        """Whether to subtract the batch mean as the baseline."""
        return self.config.baseline == "batch_mean"

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import composed_loss, unweighted

        return composed_loss(self.config, batch, counts, unweighted(batch), kl_coef=kl_coef)
