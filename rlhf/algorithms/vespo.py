"""VESPO (arXiv:2602.10693) uses a smooth weight of the whole response's ratio, derived for stale samples."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import unclipped
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.objectives import masking, policy_loss, weighted_loss


class VESPOConfig(OnlineConfig):
    """Variational sequence-level soft policy optimisation: w^power * exp(decay * (1 - w)) of the response's ratio w."""

    off_policy_keys: ClassVar[tuple[str, ...]] = (
        "power_positive",
        "decay_positive",
        "power_negative",
        "decay_negative",
    )
    name: Literal["vespo"]
    power_positive: float = Field(default=2.0, ge=0.0)
    """Power of the ratio for advantages of at least 0: larger values lower the weight faster at ratios below 1."""
    decay_positive: float = Field(default=3.0, gt=0.0)
    """Decay for advantages of at least 0: larger values lower the weight faster at ratios above 1."""
    power_negative: float = Field(default=3.0, ge=0.0)
    """Power of the ratio for negative advantages."""
    decay_negative: float = Field(default=2.0, gt=0.0)
    """Decay for negative advantages."""


class VESPO(GroupRelative):
    """The loss is REINFORCE with a weight without gradient. Nothing is clipped, so the clip fraction is 0.

    Deviation from TRL: `correction` corrects the sampler's mismatch; the weight does not.
    """

    config: VESPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        config, mask = self.config, batch.response_mask
        log_ratio = (batch.logprobs.detach() - batch.old_logprobs).where(mask, 0.0)
        weights = weighted_loss.vespo_weights(
            masking.to_tokens(masking.sequence_sums(log_ratio, batch.lengths), batch.lengths, num_tokens=len(mask)),
            batch.advantages,
            power_positive=config.power_positive,
            decay_positive=config.decay_positive,
            power_negative=config.power_negative,
            decay_negative=config.decay_negative,
        )
        return unclipped(batch, policy_loss.reinforce(batch.logprobs, weights * batch.advantages, mask))
