"""SAPO (arXiv:2511.20347) replaces the clip by a smooth gate."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import unclipped
from rlhf.algorithms.online_config import Aggregation, OnlineConfig, StepUse
from rlhf.objectives import policy_loss, weighted_loss


class SAPOConfig(OnlineConfig):
    """Soft adaptive policy optimisation: a token's gradient fades with the distance of the ratio from 1."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("temperature_positive", "temperature_negative")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["sapo"]
    temperature_positive: float = Field(default=1.0, gt=0.0)
    """How fast the gradient of a token with a positive advantage fades."""
    temperature_negative: float = Field(default=1.05, gt=0.0)
    """How fast the gradient of any other token fades. The default is faster, because a lower probability of one token
    raises the probabilities of many other tokens."""
    aggregation: Aggregation = "sequence_mean_token_mean"


class SAPO(GroupRelative):
    """4 / t * sigmoid(t * (ratio - 1)) replaces the ratio. Nothing is clipped, so the clip fraction is 0."""

    config: SAPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        mask = batch.response_mask
        ratio = policy_loss.importance_ratio(batch.logprobs, batch.old_logprobs, mask)
        per_token = weighted_loss.sapo(
            ratio,
            batch.advantages,
            mask,
            temperature_positive=self.config.temperature_positive,
            temperature_negative=self.config.temperature_negative,
        )
        return unclipped(batch, per_token)
