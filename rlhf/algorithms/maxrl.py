"""MaxRL (arXiv:2602.02710) divides centred scores by the group's mean: rare right answers count most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.grpo import GroupRelative
from rlhf.algorithms.online import SequenceOutcomes
from rlhf.algorithms.online_config import ClippedConfig, LossKLConfig
from rlhf.deferred import Float, Tensor
from rlhf.errors import UserError
from rlhf.objectives import advantages


class MaxRLConfig(ClippedConfig):
    """Maximum likelihood reinforcement learning: the gradient approaches that of log pass rate as groups grow."""

    name: Literal["maxrl"]
    kl: LossKLConfig = LossKLConfig()  # a penalty in the reward could make scores negative
    """Penalty towards the reference model."""

    def problems(self, responses: Responses) -> Iterator[tuple[str, str]]:
        """Yield a length penalty for negative scores."""
        penalty = self.length_penalty
        if penalty is not None and penalty.by == "whole_group":
            text = "is whole_group, which lowers scores of 0, but maxrl needs scores of at least 0; set group"
            yield "algorithm.length_penalty.by", text
        elif penalty is not None and penalty.weight > penalty.min_score:
            text = f"is {penalty.weight:g}, above min_score {penalty.min_score:g}, but maxrl needs scores of at least 0"
            yield "algorithm.length_penalty.weight", f"{text}; lower it"


class MaxRL(GroupRelative):
    """Every token of a response has the response's advantage: (score - mean) / mean of the group.

    Deviations from the paper: 1. GRPO's clip and aggregation (one optimizer step per batch is the paper's gradient);
    2. scores may have any value from 0, not only 0 and 1.
    """

    config: MaxRLConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the centred scores divided by the group's mean. UserError for a negative score."""
        if (lowest := float(outcomes.scores.min())) < 0.0:
            raise UserError(
                f"A response has the score {lowest:g}, but algorithm maxrl divides by the mean score of a group, so "
                "scores must be at least 0. Change the rewards, such as a penalty or `normalize`, or use grpo."
            )
        return advantages.group_relative_to_mean(outcomes.scores, group_size=outcomes.group_size)
