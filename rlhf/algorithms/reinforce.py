"""REINFORCE (Williams 1992): log-probabilities weighed by the rewards to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.shared import OnlineConfig, RewardKLConfig, SequenceOutcomes, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from rlhf.algorithms.losses import LossTerms, PolicyMicrobatch, StepCounts


class ReinforceConfig(OnlineConfig):
    """The plain policy gradient. Right for one optimizer step a batch: no ratio says how old a sample is."""

    name: Literal["reinforce"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token."""
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    """What is taken off the rewards to come: their mean over the batch's sampled tokens, or nothing."""


class Reinforce(WithoutCritic):
    """A token's advantage is the discounted score less the KL penalties from it on, less the baseline."""

    compares_responses = False

    def __init__(self, config: ReinforceConfig) -> None:
        self.config = config

    @property
    def centers(self) -> bool:
        """With the batch's mean as the baseline."""
        return self.config.baseline == "batch_mean"

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> None:
        """None: advantages are per token."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """The rewards to come, twice: the baseline is not taken off them yet."""
        from rlhf.objectives.advantages import reward_to_go

        returns = reward_to_go(rewards, response_mask, lengths, gamma=self.config.gamma)
        return returns, returns

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import composed_loss, unweighted

        return composed_loss(self.config, batch, counts, unweighted(batch), kl_coef=kl_coef)
