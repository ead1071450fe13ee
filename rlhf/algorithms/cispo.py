"""CISPO (MiniMax-M1, arXiv:2506.13585) clips the importance weight, so that no token loses its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import OnlineConfig, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class CISPOConfig(OnlineConfig):
    """CISPO is REINFORCE with bounded importance weights. The weights carry no gradient."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("min_ratio", "max_ratio")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["cispo"]
    """The algorithm."""
    min_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Lower bound on the weight. The paper has no lower bound."""
    max_ratio: float = Field(default=5.0, gt=1.0)
    """Upper bound on the weight (arXiv:2510.13786 reports equal results for 4 to 8)."""


class CISPO(GroupRelative):
    """The loss is weight times log-probability, aggregated over the tokens of the whole optimizer step (eq. 4)."""

    config: CISPOConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import composed_loss
        from rlhf.algorithms.microbatch import Surrogate
        from rlhf.objectives.policy_loss import importance_ratio
        from rlhf.objectives.weighted_loss import cispo

        config, mask = self.config, batch.response_mask
        ratio = importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask)
        surrogate = Surrogate(
            per_token=cispo(
                ratio, batch.logprobs, batch.advantages, mask, min_ratio=config.min_ratio, max_ratio=config.max_ratio
            ),
            ratio=ratio,
            clipped=mask & ((ratio < config.min_ratio) | (ratio > config.max_ratio)),
        )
        return composed_loss(config, batch, counts, surrogate, kl_coef=kl_coef)
