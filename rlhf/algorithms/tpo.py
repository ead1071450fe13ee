"""TPO (arXiv:2405.16681) learns preferences without a reference model, and imitates a third, gold response."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairScores
from rlhf.algorithms.simpo import MarginConfig, RewardMargin
from rlhf.deferred import Float, Tensor


class TPOConfig(MarginConfig):
    """Triple preference optimisation. Rows also have `reference`, the gold response."""

    needs_gold: ClassVar[bool] = True
    name: Literal["tpo"]
    beta: float = Field(default=0.01, gt=0.0)
    """Factor of the log-probabilities."""
    gamma: float = Field(default=0.0, ge=0.0)
    """Required margin of the chosen reward over the rejected reward, after beta. TPO-L has a margin above 0."""
    length_normalize: bool = False
    """Use the mean log-probability per token instead of the sum over a response (TPO-L). Then multiply beta by about
    the length of a response."""
    sft_coef: float = Field(default=1.0, gt=0.0)
    """Weight of the mean negative log-probability of the gold responses' tokens (the paper's alpha)."""


class TPO(RewardMargin):
    """Rewards are summed log-probabilities, as in CPO. The supervised term uses the gold response."""

    config: TPOConfig

    def scores(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return log-probabilities, summed or averaged over a response."""
        if self.config.length_normalize:
            return scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        return scores.chosen, scores.rejected
