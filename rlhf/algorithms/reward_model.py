"""Reward models learn a scalar head on pairs of responses (Bradley-Terry, arXiv:2203.02155, eq. 1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import AlgorithmConfig, Kind
from rlhf.algorithms.pairs import PairAlgorithm, PairScores
from rlhf.deferred import Float, Tensor
from rlhf.objectives import reward_model_loss


class RewardModelingConfig(AlgorithmConfig):
    """A model of `policy` with a scalar head. A later run loads the result by `reward.model`."""

    kind: ClassVar[Kind] = "reward_model"
    name: Literal["reward_model"]
    centering: float = Field(default=0.0, ge=0.0)
    """Weight of (chosen + rejected)^2, to hold the scores around 0 (arXiv:2312.09244)."""


class RewardModeling(PairAlgorithm):
    """The loss is Bradley-Terry on the scores, with the data's margins and the centring term."""

    config: RewardModelingConfig

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        losses = reward_model_loss.bradley_terry(scores.chosen, scores.rejected, margin=scores.margins)
        if self.config.centering:
            losses = losses + self.config.centering * reward_model_loss.centering(scores.chosen, scores.rejected)
        return losses

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the head's scores unchanged."""
        return scores.chosen, scores.rejected
