"""Online DPO (arXiv:2402.04792) and iterative DPO (arXiv:2312.11456) run DPO on pairs of the policy's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf.algorithms.dpo import DPO, LogRatioConfig
from rlhf.algorithms.shared import FollowedReferenceConfig


class OnlineDPOConfig(LogRatioConfig, FollowedReferenceConfig):
    """DPO on the best and the worst of each prompt's responses."""

    name: Literal["online_dpo"]
    """The algorithm."""


class OnlineDPO(DPO):
    """The losses are DPO's. The policy samples the responses, and the rewards decide the preference in each pair.

    Deviations from the papers: 1. of more than two responses the best and the worst are a pair, as in arXiv:2312.11456;
    2. log-probabilities are taken at rollouts.temperature, as in sampling.
    """

    def __init__(self, config: OnlineDPOConfig) -> None:
        super().__init__(config)
        self.reference_every = config.reference_every

    def pair(self, scores: Sequence[float]) -> tuple[int, int] | None:
        """Return the best and the worst response of a prompt, or None if all scores are equal. Ties take the first."""
        best, worst = max(scores), min(scores)
        return None if best == worst else (scores.index(best), scores.index(worst))
