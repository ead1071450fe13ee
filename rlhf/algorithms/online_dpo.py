"""Online DPO (arXiv:2402.04792) and iterative DPO (arXiv:2312.11456) run DPO on pairs of the policy's own responses."""

from __future__ import annotations

from typing import ClassVar, Literal

from rlhf.algorithms.algorithm import Kind
from rlhf.algorithms.dpo import LogRatioAlgorithm, LogRatioConfig
from rlhf.algorithms.online_config import FollowedReferenceConfig


class OnlineDPOConfig(LogRatioConfig, FollowedReferenceConfig):
    """DPO on the best and the worst of each prompt's responses."""

    kind: ClassVar[Kind] = "sampled_pairs"
    name: Literal["online_dpo"]

    @property
    def compares_responses(self) -> bool:
        return True  # a pair is chosen among the responses to a prompt


class OnlineDPO(LogRatioAlgorithm):
    """The losses are DPO's. The policy samples the responses, and the rewards decide the preference in each pair.

    Deviations from the papers: 1. of more than two responses the best and the worst are a pair, as in arXiv:2312.11456;
    2. log-probabilities are taken at rollouts.temperature, as in sampling.
    """

    config: OnlineDPOConfig
