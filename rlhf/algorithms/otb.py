"""OTB (arXiv:2602.07078) uses the energy-weighted mean return of the group at the same step as a token's baseline."""

from __future__ import annotations

from typing import ClassVar, Literal

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.online_config import Aggregation, ClippedConfig, StepUse


class OTBConfig(ClippedConfig):
    """Policy gradient with the optimal token baseline."""

    takes_steps: ClassVar[StepUse] = "rewards"
    name: Literal["otb"]
    aggregation: Aggregation = "sequence_mean_token_sum"


class OTB(OnlineAlgorithm):
    """A token's advantage is its return minus the baseline of its group's tokens at the same step.

    A response's weight in the baseline is its energy so far, a proxy of its squared gradient: uncertain responses count
    for more than certain ones. The policy worker computes it, since a group's responses may be on several ranks.

    Deviations from the paper: 1. tokens beyond the end of all other responses of the group have no baseline, as in
    verl; 2. the weights of algorithm.correction do not enter the energy; 3. if a batch takes several optimizer steps,
    token ratios are clipped as in PPO.
    """

    config: OTBConfig
    has_step_baseline = True
