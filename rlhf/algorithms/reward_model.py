"""Reward models learn a scalar head on pairs of responses (Bradley-Terry, arXiv:2203.02155, eq. 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairScores
from rlhf.algorithms.section import Section

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class RewardModelingConfig(Section):
    """A model of `policy` with a scalar head. A later run loads the result by `reward.model`."""

    name: Literal["reward_model"]
    """The algorithm."""
    centering: float = Field(default=0.0, ge=0.0)
    """Weight of (chosen + rejected)^2, which keeps the scores around 0 (arXiv:2312.09244)."""


class RewardModeling:
    """The loss is Bradley-Terry on the scores, with the data's margins and the centring term."""

    needs_reference = False
    needs_gold = False
    wpo = False
    couples = False
    sft_coef = 0.0
    length_alpha = 1.0

    def __init__(self, config: RewardModelingConfig) -> None:
        self.config = config

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """Return one loss per pair."""
        from rlhf.objectives.reward_model_loss import bradley_terry, centering

        losses = bradley_terry(scores.chosen, scores.rejected, margin=scores.margins)
        if self.config.centering:
            losses = losses + self.config.centering * centering(scores.chosen, scores.rejected)
        return losses

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the head's scores unchanged."""
        return scores.chosen, scores.rejected
