"""SAPO (arXiv:2511.20347) replaces the clip by a smooth gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import Aggregation, OnlineConfig, StepUse

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class SAPOConfig(OnlineConfig):
    """Soft adaptive policy optimisation: a token's gradient fades with the distance of its ratio from 1."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("temperature_positive", "temperature_negative")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["sapo"]
    """The algorithm."""
    temperature_positive: float = Field(default=1.0, gt=0.0)
    """How fast it fades where the advantage is positive."""
    temperature_negative: float = Field(default=1.05, gt=0.0)
    """The same where it is not: faster, because lowering one token raises many others."""
    aggregation: Aggregation = "sequence_mean_token_mean"
    """How per-token losses are weighted over the whole optimizer step."""


class SAPO(GroupRelative):
    """4 / t * sigmoid(t * (ratio - 1)) replaces the ratio. Nothing is clipped, so the clip fraction is 0."""

    config: SAPOConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        import torch

        from rlhf.algorithms.losses import composed_loss
        from rlhf.algorithms.microbatch import Surrogate
        from rlhf.objectives.policy_loss import importance_ratio
        from rlhf.objectives.weighted_loss import sapo

        mask = batch.response_mask
        ratio = importance_ratio(batch.logprobs, batch.old_logprobs, mask)
        per_token = sapo(
            ratio,
            batch.advantages,
            mask,
            temperature_positive=self.config.temperature_positive,
            temperature_negative=self.config.temperature_negative,
        )
        surrogate = Surrogate(per_token=per_token, ratio=ratio.detach(), clipped=torch.zeros_like(mask))
        return composed_loss(self.config, batch, counts, surrogate, kl_coef=kl_coef)
