"""Dr. GRPO (arXiv:2503.20783) is GRPO without GRPO's biases of response length and of question difficulty."""

from __future__ import annotations

from typing import ClassVar, Literal

from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import Aggregation, ClippedConfig, StepUse
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class DrGRPOConfig(ClippedConfig):
    """GRPO done right: divides neither by the group's standard deviation nor by a response's length."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["dr_grpo"]
    aggregation: Aggregation = "token_sum_norm"


class DrGRPO(OnlineAlgorithm):
    """Scores are centred. Token losses are summed and divided by a constant, and every length has the same weight."""

    config: DrGRPOConfig
    advantages_by_group = True

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus its group's mean."""
        return advantages.group_centered(outcomes.scores, group_size=outcomes.group_size)

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return each step reward minus the mean of its group."""
        return advantages.steps_centered(rewards)
