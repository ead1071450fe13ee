"""ORPO (arXiv:2403.07691) is supervised fine-tuning on the chosen response with an odds-ratio penalty on the
rejected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairScores
from rlhf.algorithms.section import Section

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ORPOConfig(Section):
    """Odds-ratio preference optimisation, without a reference model."""

    name: Literal["orpo"]
    """The algorithm."""
    beta: float = Field(default=0.1, gt=0.0)
    """Weight of the odds-ratio term (the paper's lambda)."""


class ORPO:
    """Deviation from the paper: the supervised term covers the chosen response's tokens alone, not the prompt's."""

    needs_reference = False
    needs_gold = False
    wpo = False
    couples = False
    sft_coef = 1.0
    length_alpha = 1.0

    def __init__(self, config: ORPOConfig) -> None:
        self.config = config

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """Return the odds-ratio term of each pair."""
        from rlhf.objectives.preference_loss import odds_ratio

        chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        return self.config.beta * odds_ratio(chosen, rejected)

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return beta times the average log-probabilities."""
        beta = self.config.beta
        return beta * scores.chosen / scores.chosen_tokens, beta * scores.rejected / scores.rejected_tokens
