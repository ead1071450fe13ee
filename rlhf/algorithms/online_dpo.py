"""Online DPO (arXiv:2402.04792) and iterative DPO (arXiv:2312.11456): DPO on pairs of the policy's own responses."""

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
    """DPO's losses; the responses are the policy's, and the rewards say which of a prompt's two is preferred.

    Deviations from the papers: 1. of more than two responses the best and the worst are a pair, as in arXiv:2312.11456;
    2. log-probabilities are taken at rollouts.temperature, those of the distribution that was sampled.
    """

    def __init__(self, config: OnlineDPOConfig) -> None:
        super().__init__(config)
        self.reference_every = config.reference_every

    def pair(self, scores: Sequence[float]) -> tuple[int, int] | None:
        """Best and worst response of a prompt, the first of equals; None: all scored alike, nothing is preferred."""
        best, worst = max(scores), min(scores)
        return None if best == worst else (scores.index(best), scores.index(worst))
