"""OPO (arXiv:2505.23585) is on-policy REINFORCE with the baseline of least variance."""

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
    """The baseline weights a group's scores by their responses' lengths. There is no penalty and no entropy bonus.

    Deviation from the paper: if a batch takes several optimizer steps, token ratios are clipped as in PPO.
    """

    def __init__(self, config: OPOConfig) -> None:
        self.config = config

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus its group's length-weighted mean."""
        from rlhf.objectives.advantages import length_weighted_centered

        return length_weighted_centered(outcomes.scores, outcomes.num_tokens, group_size=outcomes.group_size)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
