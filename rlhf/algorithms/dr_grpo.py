"""Dr. GRPO (arXiv:2503.20783) is GRPO without its biases of response length and of question difficulty."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf.algorithms.shared import Aggregation, ClippedConfig, SequenceOutcomes, StepUse, WithoutCritic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rlhf.algorithms.microbatch import LossTerms, PolicyMicrobatch, StepCounts


class DrGRPOConfig(ClippedConfig):
    """GRPO done right: it divides neither by the group's standard deviation nor by a response's length."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dr_grpo"]
    """The algorithm."""
    aggregation: Aggregation = "token_sum_norm"
    """How per-token losses are weighted over the whole optimizer step."""


class DrGRPO(WithoutCritic):
    """Scores are centred. Token losses are summed and divided by a constant, so that every length has the same
    weight."""

    def __init__(self, config: DrGRPOConfig) -> None:
        self.config = config

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus its group's mean."""
        from rlhf.objectives.advantages import group_centered

        return group_centered(outcomes.scores, group_size=outcomes.group_size)

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return each step reward minus the mean of its group."""
        from rlhf.objectives.advantages import steps_centered

        return steps_centered(rewards)

    def policy_loss(self, batch: PolicyMicrobatch, counts: StepCounts, *, kl_coef: float) -> LossTerms:
        """Return this micro-batch's share of the policy loss."""
        from rlhf.algorithms.losses import clipped, composed_loss

        return composed_loss(self.config, batch, counts, clipped(self.config, batch), kl_coef=kl_coef)
