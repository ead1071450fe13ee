"""DPPO (arXiv:2602.04879) leaves a token out once the probability, not the ratio, has moved too far."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online_config import OnlineConfig, StepUse
from rlhf.objectives import policy_loss, weighted_loss


class DPPOConfig(OnlineConfig):
    """Divergence proximal policy optimisation, with the paper's binary divergences of {token, rest}."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("divergence", "max_decrease", "max_increase", "max_ratio")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dppo"]
    divergence: Literal["tv", "kl"] = "tv"
    """tv: the change of the sampled token's probability. kl: KL(old || new) of that probability, in nats."""
    max_decrease: float = Field(default=0.15, gt=0.0)
    """Divergence beyond which a token of negative advantage, made less likely, is left out. About 0.05 for kl."""
    max_increase: float = Field(default=0.15, gt=0.0)
    """Divergence beyond which a token of positive advantage, made likelier, is left out. About 0.05 for kl."""
    max_ratio: float = Field(default=20.0, gt=1.0)
    """Upper bound on the importance weight of the remaining tokens."""


class DPPO(GroupRelative):
    """The loss is CISPO's, over the tokens inside the trust region.

    Deviation from the paper: the old policy is the trainer's policy at the start of the update, not the sampler, unless
    correction.mode is bypass.
    """

    config: DPPOConfig

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        config, mask = self.config, batch.response_mask
        columns = (batch.logprobs, batch.old_logprobs, batch.advantages, mask)
        down, up = config.max_decrease, config.max_increase
        if config.divergence == "tv":
            trusted = weighted_loss.trusted_by_tv(*columns, max_decrease=down, max_increase=up)
        else:
            trusted = weighted_loss.trusted_by_kl(*columns, max_kl_decrease=down, max_kl_increase=up)
        ratio = policy_loss.importance_ratio(batch.logprobs.detach(), batch.old_logprobs, mask)
        return Surrogate(
            per_token=weighted_loss.cispo(
                ratio, batch.logprobs, batch.advantages, trusted, min_ratio=0.0, max_ratio=config.max_ratio
            ),
            ratio=ratio,
            clipped=mask & (~trusted | (ratio > config.max_ratio)),
        )
