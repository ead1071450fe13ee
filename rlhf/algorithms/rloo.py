"""RLOO (arXiv:2402.14740) is REINFORCE with the mean score of a prompt's other responses as the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.algorithms.shared import Aggregation, ClippedConfig, RewardKLConfig, SequenceOutcomes, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class RLOOConfig(ClippedConfig):
    """REINFORCE with a leave-one-out baseline."""

    name: Literal["rloo"]
    """The algorithm."""
    kl: RewardKLConfig = RewardKLConfig()
    """Penalty towards the reference model."""
    aggregation: Aggregation = "sequence_mean_token_sum"
    """How per-token losses are weighted over the whole optimizer step."""


class RLOO(WithoutCritic):
    """A response is one action: its tokens' losses are summed.

    Deviation from the paper: if a batch takes several optimizer steps, token ratios are clipped as in PPO. In the first
    of them every ratio is 1, and the gradient equals REINFORCE's.
    """

    def __init__(self, config: RLOOConfig) -> None:
        self.config = config

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the mean of its group's other scores."""
        from rlhf.objectives.advantages import leave_one_out

        return leave_one_out(outcomes.scores, group_size=outcomes.group_size)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
