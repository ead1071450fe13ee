"""GMPO (arXiv:2507.20673) uses the geometric mean of token ratios, each clipped separately."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online_config import Aggregation, OnlineConfig
from rlhf.objectives import sequence_ratios


class GMPOConfig(OnlineConfig):
    """Geometric-mean policy optimisation: outliers among token ratios count little, which allows a wide clip."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    name: Literal["gmpo"]
    clip_low: float = Field(default=0.4, gt=0.0)
    """A token's log-ratio is held above -clip_low where the advantage is negative."""
    clip_high: float = Field(default=0.4, gt=0.0)
    """A token's log-ratio is held below clip_high where the advantage is positive."""
    aggregation: Aggregation = "sequence_mean_token_mean"


class GMPO(GroupRelative):
    """The loss is -ratio * advantage, with a common ratio for all tokens of a response."""

    config: GMPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        config, mask, advantages = self.config, batch.response_mask, batch.advantages
        low, high = config.clip_low, config.clip_high
        columns = (batch.logprobs, batch.old_logprobs, advantages, mask, batch.lengths)
        ratio = sequence_ratios.geometric_mean_ratio(*columns, clip_low=low, clip_high=high)
        log_ratio = (batch.logprobs.detach() - batch.old_logprobs).where(mask, 0.0)
        return Surrogate(
            per_token=(-ratio * advantages).where(mask, 0.0),
            ratio=ratio.detach(),
            clipped=((log_ratio > high) & (advantages > 0)) | ((log_ratio < -low) & (advantages < 0)),
        )
