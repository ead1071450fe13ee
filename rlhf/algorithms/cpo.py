"""CPO (arXiv:2401.08417) is DPO's loss with a uniform reference and a supervised term on the chosen response."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.algorithms.pairs import PairAlgorithm, PairScores, PreferenceConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import preference_loss as of
from rlhf.sections import OnlyWith


class CPOConfig(PreferenceConfig):
    """Contrastive preference optimisation, without a reference model."""

    name: Literal["cpo"]
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair's log-probabilities."""
    beta: float = Field(default=0.1, gt=0.0)
    """Factor of the log-probabilities."""
    label_smoothing: Annotated[float, OnlyWith("loss", "sigmoid")] = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of pairs with a wrong preference, for `sigmoid` only."""
    sft_coef: float = Field(default=1.0, ge=0.0)
    """Weight of the mean negative log-probability of the chosen responses' tokens."""


class CPO(PairAlgorithm):
    """The losses read summed log-probabilities (averaged for `ipo`, as in TRL)."""

    config: CPOConfig

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        beta = self.config.beta
        if self.config.loss == "hinge":
            return of.hinge(scores.chosen, scores.rejected, beta=beta)
        if self.config.loss == "ipo":
            chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
            return of.ipo(chosen, rejected, beta=beta)
        return of.dpo(scores.chosen, scores.rejected, beta=beta, label_smoothing=self.config.label_smoothing)

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return beta times the log-probabilities."""
        return self.config.beta * scores.chosen, self.config.beta * scores.rejected
