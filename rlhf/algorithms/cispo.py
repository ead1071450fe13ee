"""CISPO (MiniMax-M1, arXiv:2506.13585) clips the importance weight, so that every token keeps a gradient."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online_config import OnlineConfig, StepUse
from rlhf.objectives import policy_loss, weighted_loss


class CISPOConfig(OnlineConfig):
    """CISPO is REINFORCE with bounded importance weights. The weights carry no gradient."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("min_ratio", "max_ratio")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["cispo"]
    min_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Lower bound on the weight. The paper has no lower bound."""
    max_ratio: float = Field(default=5.0, gt=1.0)
    """Upper bound on the weight (arXiv:2510.13786 reports equal results for 4 to 8)."""


class CISPO(GroupRelative):
    """The loss is weight times log-probability, aggregated over the tokens of the whole optimizer step (eq. 4)."""

    config: CISPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        config, mask = self.config, batch.response_mask
        ratio = policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask)
        low, high = config.min_ratio, config.max_ratio
        return Surrogate(
            per_token=weighted_loss.cispo(ratio, batch.logprobs, batch.advantages, mask, min_ratio=low, max_ratio=high),
            ratio=ratio,
            clipped=mask & ((ratio < low) | (ratio > high)),
        )
