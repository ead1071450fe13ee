"""GPG (arXiv:2504.02546) is the policy gradient with a group baseline."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.grpo import GROUP_STD_EPS
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes, plain_gradient
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class GPGConfig(OnlineConfig):
    """Group policy gradient: no ratio, no clip, no penalty."""

    name: Literal["gpg"]
    std_normalize: bool = False
    """Divide the centred scores by their group's standard deviation."""


class GPG(OnlineAlgorithm):
    """Centred scores times num_groups / num_groups_with_unequal_scores: flat groups do not dilute the gradient.

    Deviation from the paper: the factor is computed over the step's whole batch, not over a minibatch.
    """

    config: GPGConfig

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return the scores minus their group's mean, scaled."""
        scores, group_size = outcomes.scores, outcomes.group_size
        scale = advantages.uneven_group_scale(scores, group_size=group_size)
        if self.config.std_normalize:
            return scale * advantages.group_normalized(scores, group_size=group_size, eps=GROUP_STD_EPS)
        return scale * advantages.group_centered(scores, group_size=group_size)

    def surrogate(self, batch: PolicyMicrobatch) -> Surrogate:
        return plain_gradient(batch)
