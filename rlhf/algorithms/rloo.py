"""RLOO (arXiv:2402.14740) is REINFORCE with the mean score of the remaining responses to the prompt as the baseline."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import Aggregation, ClippedConfig, RewardKLConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class RLOOConfig(ClippedConfig):
    """REINFORCE with a leave-one-out baseline."""

    name: Literal["rloo"]
    kl: RewardKLConfig = RewardKLConfig()
    aggregation: Aggregation = "sequence_mean_token_sum"


class RLOO(OnlineAlgorithm):
    """A response is one action: the tokens' losses are summed.

    Deviation from the paper: if a batch takes several optimizer steps, token ratios are clipped as in PPO. In the first
    step every ratio is 1, and the gradient equals REINFORCE's.
    """

    config: RLOOConfig
    advantages_by_group = True

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the mean of the group's remaining scores."""
        return advantages.leave_one_out(outcomes.scores, group_size=outcomes.group_size)
