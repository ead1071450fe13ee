"""OPO (arXiv:2505.23585): on-policy REINFORCE with the baseline of least variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.shared import Aggregation, ClippedConfig, SequenceOutcomes, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class OPOConfig(ClippedConfig):
    """On-policy RL with the optimal reward baseline. The paper trains each batch in one optimizer step."""

    name: Literal["opo"]
    """The algorithm."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How per-token losses are weighted over the whole optimizer step."""


class OPO(WithoutCritic):
    """The baseline weighs a group's scores by their responses' lengths; no penalty, no entropy bonus.

    Deviation from the paper: where a batch is trained on in several optimizer steps, token ratios are clipped as PPO's
    are.
    """

    def __init__(self, config: OPOConfig) -> None:
        self.config = config

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Each score less its group's mean, weighted by length."""
        from rlhf.objectives.advantages import length_weighted_centered

        return length_weighted_centered(outcomes.scores, outcomes.num_tokens, group_size=outcomes.group_size)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """This micro-batch's share of the policy's loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
