"""RAFT (arXiv:2304.06767): imitation of the best of the policy's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.shared import LossKLConfig, OnlineConfig, SequenceOutcomes, WithoutCritic
from rlhf.objectives.selection import best

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class RAFTConfig(OnlineConfig):
    """Reward-ranked fine-tuning: rejection sampling."""

    name: Literal["raft"]
    """The algorithm."""
    keep: int = Field(default=1, ge=1)
    """Of a prompt's responses so many are trained on, those with the highest scores."""
    min_score: float | None = None
    """Responses with a lower score are left out, also if they are among the best; null: none is."""
    kl: LossKLConfig = LossKLConfig()
    """Penalty towards the reference model."""


class RAFT(WithoutCritic):
    """The supervised loss of the responses that are kept; the others are not computed on.

    Deviations from the paper: 1. the policy is updated after each batch of prompts, where the paper fine-tunes on what
    it has gathered; 2. the penalty towards the reference is a term of the loss, not of the score.
    """

    def __init__(self, config: RAFTConfig) -> None:
        self.config = config
        self.most_kept = config.keep

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """The best, as far as they are good enough."""
        least = self.config.min_score
        return [place for place in best(scores, self.config.keep) if least is None or scores[place] >= least]

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> None:
        """None: what is kept is imitated, all of it alike."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """1 for every sampled token: the loss does not read them."""
        ones = response_mask.to(rewards.dtype)
        return ones, ones

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        import torch

        from rlhf.algorithms.losses import composed_loss
        from rlhf.algorithms.microbatch import Surrogate
        from rlhf.objectives.policy_loss import importance_ratio
        from rlhf.objectives.supervised import negative_logprob

        mask = batch.response_mask
        surrogate = Surrogate(
            per_token=negative_logprob(batch.logprobs, mask),
            ratio=importance_ratio(batch.logprobs, batch.old_logprobs, mask).detach(),
            clipped=torch.zeros_like(mask),
        )
        return composed_loss(self.config, batch, counts, surrogate, kl_coef=kl_coef)
