"""ORPO (arXiv:2403.07691) is supervised fine-tuning on the chosen response with a penalty on the odds ratio."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import AlgorithmConfig, Kind
from rlhf.algorithms.pairs import PairAlgorithm, PairScores
from rlhf.deferred import Float, Tensor
from rlhf.objectives import preference_loss


class ORPOConfig(AlgorithmConfig):
    """Odds-ratio preference optimisation, without a reference model."""

    kind: ClassVar[Kind] = "preference"
    name: Literal["orpo"]
    beta: float = Field(default=0.1, gt=0.0)
    """Weight of the odds-ratio term (the paper's lambda)."""


class ORPO(PairAlgorithm):
    """Deviation from the paper: the supervised term covers the chosen response's tokens alone, not the prompt's."""

    config: ORPOConfig
    sft_coef = 1.0

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """Return the odds-ratio term of each pair."""
        chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        return self.config.beta * preference_loss.odds_ratio(chosen, rejected)

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return beta times the average log-probabilities."""
        beta = self.config.beta
        return beta * scores.chosen / scores.chosen_tokens, beta * scores.rejected / scores.rejected_tokens
