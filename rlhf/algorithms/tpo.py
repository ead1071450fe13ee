"""TPO (arXiv:2405.16681): preferences without a reference model, and imitation of a third, gold response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairScores, PreferenceConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TPOConfig(PreferenceConfig):
    """Triple preference optimisation. Rows also have `reference`, the gold response."""

    name: Literal["tpo"]
    """The algorithm."""
    beta: float = Field(default=0.01, gt=0.0)
    """Factor of the log-probabilities."""
    length_normalize: bool = False
    """Log-probabilities per token instead of summed over a response (TPO-L; its beta is larger by a response's
    length)."""
    gamma: float = Field(default=0.0, ge=0.0)
    """Margin by which the chosen reward is to exceed the rejected one, after beta; TPO-L has one."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose preference is taken to be wrong."""
    sft_coef: float = Field(default=1.0, gt=0.0)
    """Weight of the mean negative log-probability of the gold responses' tokens (the paper's alpha)."""


class TPO:
    """CPO's loss with a margin; what is imitated is the gold response, not the chosen one."""

    needs_reference = False
    needs_gold = True
    couples = False
    length_alpha = 1.0

    def __init__(self, config: TPOConfig) -> None:
        self.config = config
        self.sft_coef = config.sft_coef
        self.wpo = config.wpo

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """One a pair."""
        from rlhf.objectives.preference_loss import simpo

        config = self.config
        return simpo(
            *self._scores(scores), beta=config.beta, gamma=config.gamma, label_smoothing=config.label_smoothing
        )

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta times the log-probabilities."""
        chosen, rejected = self._scores(scores)
        return self.config.beta * chosen, self.config.beta * rejected

    def _scores(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        if self.config.length_normalize:
            return scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        return scores.chosen, scores.rejected
