"""SimPO (arXiv:2405.14734): the average log-probability of a response is its reward, and no reference is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairScores, PreferenceConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SimPOConfig(PreferenceConfig):
    """Simple preference optimisation."""

    name: Literal["simpo"]
    """The algorithm."""
    beta: float = Field(default=2.0, gt=0.0)
    """Factor of the reward."""
    gamma: float = Field(default=1.0, ge=0.0)
    """Margin by which the chosen reward is to exceed the rejected one, after beta; some half of beta is usual."""
    alpha: float = 0.0
    """Shape of the reward (1 - p^-alpha) / alpha: above 0 it falls faster for unlikely responses (AlphaPO,
    arXiv:2501.03884); 0 is log p, SimPO's own."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs whose preference is taken to be wrong."""


class SimPO:
    """A margin between average log-probabilities."""

    needs_reference = False
    needs_gold = False
    couples = False
    length_alpha = 1.0

    def __init__(self, config: SimPOConfig) -> None:
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
        """beta times the average log-probabilities, shaped."""
        chosen, rejected = self._scores(scores)
        return self.config.beta * chosen, self.config.beta * rejected

    def _scores(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        from rlhf.objectives.divergences import alphapo_scores

        chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        alpha = self.config.alpha
        return alphapo_scores(chosen, alpha=alpha), alphapo_scores(rejected, alpha=alpha)
