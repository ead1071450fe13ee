"""SimPO (arXiv:2405.14734) uses the average log-probability of a response as the reward, without a reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairAlgorithm, PairScores, PreferenceConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import divergences, preference_loss


class MarginConfig(PreferenceConfig):
    """A margin between two rewards computed without a reference."""

    beta: float = Field(default=2.0, gt=0.0)
    """Factor of the reward."""
    gamma: float = Field(default=1.0, ge=0.0)
    """Required margin of the chosen reward over the rejected reward, after beta; about half of beta is usual."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of pairs with a wrong preference."""


class SimPOConfig(MarginConfig):
    """Simple preference optimisation, without a reference model."""

    name: Literal["simpo"]
    alpha: float = 0.0
    """Shape of the reward (1 - p^-alpha) / alpha: above 0 the reward falls faster for unlikely responses (AlphaPO,
    arXiv:2501.03884); 0 is SimPO's log p."""


class RewardMargin(PairAlgorithm):
    """The loss reads the margin between two rewards. A subclass defines the reward before beta."""

    config: MarginConfig

    def scores(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the rewards of the chosen and of the rejected responses, before beta."""
        raise NotImplementedError

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        beta, gamma, smoothing = self.config.beta, self.config.gamma, self.config.label_smoothing
        return preference_loss.simpo(*self.scores(scores), beta=beta, gamma=gamma, label_smoothing=smoothing)

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return beta times the results of `scores`."""
        chosen, rejected = self.scores(scores)
        return self.config.beta * chosen, self.config.beta * rejected


class SimPO(RewardMargin):
    """Rewards are average log-probabilities, shaped by alpha."""

    config: SimPOConfig

    def scores(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (1 - p^-alpha) / alpha of the averages."""
        chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
        alpha = self.config.alpha
        return divergences.alphapo_scores(chosen, alpha=alpha), divergences.alphapo_scores(rejected, alpha=alpha)
