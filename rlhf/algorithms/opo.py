"""OPO (arXiv:2505.23585) is on-policy REINFORCE with the baseline of least variance."""

from __future__ import annotations

from typing import Literal

from rlhf.algorithms.online import OnlineAlgorithm, SequenceOutcomes
from rlhf.algorithms.online_config import Aggregation, ClippedConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import advantages


class OPOConfig(ClippedConfig):
    """On-policy RL with the optimal reward baseline. The paper trains each batch in a single optimizer step."""

    name: Literal["opo"]
    aggregation: Aggregation = "sequence_mean_token_sum"


class OPO(OnlineAlgorithm):
    """The baseline weights a group's scores by their responses' lengths. There is no penalty and no entropy bonus.

    Deviation from the paper: if a batch takes several optimizer steps, token ratios are clipped as in PPO.
    """

    config: OPOConfig
    advantages_by_group = True

    def sequence_advantages(self, outcomes: SequenceOutcomes) -> Float[Tensor, " B"]:
        """Return each score minus the group's length-weighted mean."""
        return advantages.length_weighted_centered(outcomes.scores, outcomes.num_tokens, group_size=outcomes.group_size)
