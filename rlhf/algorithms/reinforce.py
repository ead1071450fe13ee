"""REINFORCE (Williams 1992): log-probabilities weighed by the rewards to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.shared import OnlineConfig, RewardKLConfig, RewardsToGo, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class ReinforceConfig(OnlineConfig):
    """The plain policy gradient. Right for one optimizer step a batch: no ratio says how old a sample is."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["reinforce"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token."""
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    """What is taken off the rewards to come: their mean over the batch's sampled tokens, or nothing."""


class Reinforce(RewardsToGo):
    """A token's advantage is the discounted score less the KL penalties from it on, less the baseline."""

    compares_responses = False

    def __init__(self, config: ReinforceConfig) -> None:
        self.config = config
        self.discount = config.gamma

    @property
    def centers(self) -> bool:
        """With the batch's mean as the baseline."""
        return self.config.baseline == "batch_mean"

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import composed_loss, unweighted

        return composed_loss(self.config, batch, counts, unweighted(batch), kl_coef=kl_coef)
