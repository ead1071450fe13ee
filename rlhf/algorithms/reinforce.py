"""REINFORCE (Williams 1992) weights log-probabilities by the rewards to come."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import OnlineAlgorithm, plain_gradient
from rlhf.algorithms.online_config import OnlineConfig, RewardKLConfig, StepUse


class ReinforceConfig(OnlineConfig):
    """The plain policy gradient. Needs one optimizer step per batch, because no ratio corrects for older weights."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["reinforce"]
    kl: RewardKLConfig = RewardKLConfig()
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per sampled token."""
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    """Baseline of the rewards to come: their mean over the batch's sampled tokens, or none."""

    @property
    def compares_responses(self) -> bool:
        return False  # the baseline is the batch


class Reinforce(OnlineAlgorithm):
    """A token's advantage is the discounted score minus the KL penalties from the token on, minus the baseline."""

    config: ReinforceConfig
    advantages_by_group = True

    def __init__(self, config: ReinforceConfig) -> None:
        super().__init__(config)
        self.discount = config.gamma
        self.centers = config.baseline == "batch_mean"

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        return plain_gradient(batch)
