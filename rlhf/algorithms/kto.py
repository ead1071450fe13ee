"""KTO (arXiv:2402.01306) and related methods train on single labelled responses instead of pairs.

The reference is the policy before training. The reference's log-probabilities are computed once and stored on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind
from rlhf.deferred import Bool, Float, Tensor
from rlhf.objectives import unpaired_loss

Comparison = Literal["divergence", "mean", "zero"]
_COMPARED: Mapping[str, Comparison] = {"kto": "divergence", "bco": "mean", "apo_zero": "zero"}


class KTOConfig(AlgorithmConfig):
    """Kahneman-Tversky optimisation on labelled responses."""

    kind: ClassVar[Kind] = "unpaired"
    name: Literal["kto"]
    loss: Literal["kto", "apo_zero", "bco"] = "kto"
    """The value subtracted from a reward: `kto` the divergence from the reference, `apo_zero` (arXiv:2408.06266) 0,
    `bco` (arXiv:2404.04656) the mean reward."""
    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the constraint towards the reference."""
    desirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of a desirable response's loss. Raise the weight for rare desirable responses, until weight times count is
    about equal for both labels."""
    undesirable_weight: float = Field(default=1.0, gt=0.0)
    """Weight of an undesirable response's loss."""

    @property
    def uses_reference(self) -> bool:
        return True  # rewards are log-ratios

    @property
    def compares_with(self) -> Comparison:
        """Return the baseline: the mismatched divergence for KTO, the mean log-ratio for BCO, 0 for APO."""
        return _COMPARED[self.loss]

    @property
    def compares_with_divergence(self) -> bool:
        return self.compares_with == "divergence"


class KTO(Algorithm):
    """The losses read log-ratios and labels.

    Deviations from the papers: 1. KTO's divergence is estimated over the whole optimizer step, from each row's prompt
    with the next answer to another prompt in the data; 2. BCO's mean reward is taken over the step, without a running
    mean.
    """

    config: KTOConfig

    def losses(
        self, log_ratios: Float[Tensor, " B"], labels: Bool[Tensor, " B"], *, compared: float
    ) -> Float[Tensor, " B"]:
        """Return one loss per response, weighted by the label."""
        config = self.config
        good, bad = config.desirable_weight, config.undesirable_weight
        weights = unpaired_loss.label_weights(labels, desirable=good, undesirable=bad, dtype=log_ratios.dtype)
        if config.loss == "kto":
            return weights * unpaired_loss.kto(log_ratios, labels, beta=config.beta, kl=compared)
        if config.loss == "bco":
            return weights * unpaired_loss.bco(log_ratios, labels, beta=config.beta, delta=config.beta * compared)
        return weights * unpaired_loss.apo_zero_unpaired(log_ratios, labels, beta=config.beta)
