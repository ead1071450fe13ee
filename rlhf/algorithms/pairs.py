"""Define the base class and the shared keys of algorithms on pairs of responses.

A policy's scores are sums of log-probabilities under the loss mask. A reward model's scores come from the scoring head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind
from rlhf.deferred import Float, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """B pairs as numbers. Only `chosen`, `rejected` and `gold` carry a gradient."""

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    chosen_tokens: Float[Tensor, " B"]  # tokens of each response under the loss mask
    rejected_tokens: Float[Tensor, " B"]
    ref_chosen: Float[Tensor, " B"] | None  # scores by the reference; None: the algorithm has no reference
    ref_rejected: Float[Tensor, " B"] | None
    margins: Float[Tensor, " B"]  # from the data; 0 where the data has none
    gold: Float[Tensor, " B"] | None = None  # None: the algorithm imitates the chosen response, if any
    weights: Float[Tensor, " B"] | None = None  # of the pairs' losses; None: all 1


class PreferenceConfig(AlgorithmConfig):
    """Keys of every algorithm for training a policy on pairs."""

    kind: ClassVar[Kind] = "preference"
    sft_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the mean negative log-probability of the chosen responses' tokens (RPO, arXiv:2404.19733)."""
    wpo: bool = False
    """Whether to multiply each pair's loss (not the supervised term) by the probability of both responses under the
    current policy (WPO, arXiv:2406.11827)."""


class PairAlgorithm(Algorithm):
    """An algorithm on pairs. A subclass defines `losses` and `rewards`."""

    sft_coef: float = 0.0  # weight of the chosen (or gold) responses' mean negative log-probability
    wpo: bool = False  # whether a pair's loss is multiplied by the on-policy weights of its responses
    length_alpha: float = 1.0  # weight of the longer response's surplus tokens in a pair. 1 treats all tokens alike
    couples: bool = False  # whether a loss depends on all pairs of the step, measured in a forward pass first

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        if isinstance(config, PreferenceConfig):
            self.sft_coef, self.wpo = config.sft_coef, config.wpo

    def pair(self, scores: Sequence[float]) -> tuple[int, int] | None:
        """Return the best and the worst response of a prompt, of equals the first. None: all scores are equal."""
        best, worst = max(scores), min(scores)
        return None if best == worst else (scores.index(best), scores.index(worst))

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """Return one loss per pair. If `couples` is set, `scores` holds all pairs of the step."""
        raise NotImplementedError

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the implicit rewards of the chosen and of the rejected responses, for the metrics."""
        raise NotImplementedError
