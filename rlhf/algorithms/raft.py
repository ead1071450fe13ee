"""RAFT (arXiv:2304.06767) imitates the best of the policy's own responses."""

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
    """Number of responses per prompt to train on, by highest score."""
    min_score: float | None = None
    """Responses with a lower score are left out, even if they are among the best; null: no threshold."""
    kl: LossKLConfig = LossKLConfig()
    """Penalty towards the reference model."""


class RAFT(WithoutCritic):
    """The loss is the supervised loss of the selected responses. The other responses are not computed.

    Deviations from the paper: 1. the policy is updated after each batch of prompts, whereas the paper first gathers a
    data set; 2. the penalty towards the reference is a term of the loss, not of the score.
    """

    def __init__(self, config: RAFTConfig) -> None:
        self.config = config
        self.most_kept = config.keep

    def kept(self, scores: Sequence[float]) -> Sequence[int]:
        """Return the indices of the best responses with a score at or above the threshold."""
        least = self.config.min_score
        return [index for index in best(scores, self.config.keep) if least is None or scores[index] >= least]

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> None:
        """Return None: all selected responses are imitated with equal weight."""
        return None

    def token_advantages(
        self,
        rewards: Float[Tensor, " N"],
        values: Float[Tensor, " N"] | None,
        response_mask: Bool[Tensor, " N"],
        lengths: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return 1 for every sampled token. The loss does not read them."""
        ones = response_mask.to(rewards.dtype)
        return ones, ones

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
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
