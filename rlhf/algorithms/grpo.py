"""GRPO (arXiv:2402.03300) takes advantages from a prompt's group of responses, with a clipped surrogate, no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig, StepUse
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages

FLAT_BELOW = 1e-9  # an advantage that is 0 but for rounding, in float64
GROUP_STD_EPS = 1e-6  # the published codes use 1e-4 (TRL), 1e-6 (verl), 1e-8 and 1e-9: it matters only near std 0


class GRPOConfig(ClippedConfig):
    """Group-relative policy optimisation, without a critic."""

    takes_steps: ClassVar[StepUse] = "advantages"
    name: Literal["grpo"]
    std_normalize: bool = True
    """Divide the centred scores by their group's standard deviation; dr_grpo does not."""


class GroupRelative(OnlineAlgorithm):
    """Every token of a response has the response's advantage: the score compared with the group."""

    advantages_by_group = True

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the scores minus the group's mean, divided by the group's standard deviation."""
        return advantages.group_normalized(outcomes.scores, group_size=outcomes.group_size, eps=GROUP_STD_EPS)

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return the rewards minus their mean, divided by their standard deviation."""
        return advantages.steps_normalized(rewards, eps=GROUP_STD_EPS)


class GRPO(GroupRelative):
    """Group-relative policy optimisation.

    Deviations from the paper: 1. the loss is aggregated over the tokens of the whole optimizer step (aggregation:
    token_mean), set sequence_mean_token_mean to match the paper; 2. there is no KL penalty by default.
    """

    config: GRPOConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score compared with the group."""
        if not self.config.std_normalize:
            return advantages.group_centered(outcomes.scores, group_size=outcomes.group_size)
        return super().sequence_advantages(outcomes)

    def step_terms(self, rewards: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Return each step reward compared with all step rewards of the group."""
        return super().step_terms(rewards) if self.config.std_normalize else advantages.steps_centered(rewards)
