"""GMPO (arXiv:2507.20673) uses the geometric mean of token ratios, clipped one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.shared import Aggregation, OnlineConfig

if TYPE_CHECKING:
    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class GMPOConfig(OnlineConfig):
    """Geometric-mean policy optimisation: outliers among token ratios count little, so that the clip can be wide."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    name: Literal["gmpo"]
    """The algorithm."""
    clip_low: float = Field(default=0.4, gt=0.0)
    """A token's log-ratio is held above -clip_low where the advantage is negative."""
    clip_high: float = Field(default=0.4, gt=0.0)
    """A token's log-ratio is held below clip_high where the advantage is positive."""
    aggregation: Aggregation = "sequence_mean_token_mean"
    """How per-token losses are weighted over the whole optimizer step."""


class GMPO(GroupRelative):
    """The loss is -ratio * advantage, with one ratio for all tokens of a response."""

    config: GMPOConfig

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        import torch

        from rlhf.algorithms.losses import composed_loss
        from rlhf.algorithms.microbatch import Surrogate
        from rlhf.objectives.sequence_ratios import geometric_mean_ratio

        config, mask, advantages = self.config, batch.response_mask, batch.advantages
        ratio = geometric_mean_ratio(
            batch.logprobs,
            batch.old_logprobs,
            advantages,
            mask,
            batch.lengths,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        log_ratio = torch.where(mask, batch.logprobs.detach() - batch.old_logprobs, 0.0)
        surrogate = Surrogate(
            per_token=torch.where(mask, -ratio * advantages, 0.0),
            ratio=ratio.detach(),
            clipped=((log_ratio > config.clip_high) & (advantages > 0))
            | ((log_ratio < -config.clip_low) & (advantages < 0)),
        )
        return composed_loss(config, batch, counts, surrogate, kl_coef=kl_coef)
