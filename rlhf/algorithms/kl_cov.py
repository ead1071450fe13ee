"""KL-Cov (arXiv:2505.22617) penalises movement of the tokens with the largest decrease of the entropy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.microbatch import PolicyMicrobatch, StepTokens, Surrogate
from rlhf.algorithms.online import unclipped
from rlhf.algorithms.online_config import OnlineConfig, StepUse
from rlhf.deferred import Bool, Tensor
from rlhf.objectives import entropy, kl, policy_loss


class KLCovConfig(OnlineConfig):
    """The unclipped policy gradient with a penalty on a few tokens."""

    off_policy_keys: ClassVar[tuple[str, ...]] = ("fraction", "penalty")
    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["kl_cov"]
    fraction: float = Field(default=2e-3, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens to penalise, by largest covariance, at least one token."""
    penalty: float = Field(default=1.0, gt=0.0)
    """Weight of |logprobs - old_logprobs| on the selected tokens."""


class KLCov(GroupRelative):
    """A token's covariance compares the token with the mean token of the whole optimizer step.

    Deviation from the paper: covariances use the log-probabilities before the update, equal for every rank and
    micro-batch. Nothing is clipped, so the clip fraction is 0.
    """

    config: KLCovConfig
    selects_tokens = True

    def selected(self, step: StepTokens) -> Bool[Tensor, " N"]:
        """Return True for the tokens with a penalty."""
        covariance = entropy.advantage_covariance(step.old_logprobs, step.advantages)
        return entropy.top_covariance_tokens(covariance, fraction=self.config.fraction)

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        assert batch.selected is not None
        mask = batch.response_mask
        ratio = policy_loss.importance_ratio(batch.logprobs, batch.old_logprobs, mask)
        moved = kl.kl_k1(batch.logprobs, batch.old_logprobs).where(batch.selected, 0.0).abs()
        return unclipped(batch, (-ratio * batch.advantages).where(mask, 0.0) + self.config.penalty * moved)
