"""Define the interface and the shared keys of algorithms on pairs of responses.

A policy's scores are sums of log-probabilities under the loss mask. A reward model's scores come from its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from rlhf.algorithms.section import Section

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


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


class PreferenceConfig(Section):
    """Keys of every algorithm that trains a policy on pairs."""

    sft_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the mean negative log-probability of the chosen responses' tokens (RPO, arXiv:2404.19733)."""
    wpo: bool = False
    """Whether to multiply each pair's loss (not the supervised term) by the probability of both responses under the
    current policy (WPO, arXiv:2406.11827)."""


class PairAlgorithm(Protocol):
    """Interface of the algorithms on pairs."""

    @property
    def needs_reference(self) -> bool:
        """Whether the losses read the log-probabilities of the policy before training."""
        ...

    @property
    def needs_gold(self) -> bool:
        """Whether a row has a third, gold response, used by the supervised term instead of the chosen one."""
        ...

    @property
    def wpo(self) -> bool:
        """Whether a pair's loss is multiplied by the on-policy weights of its responses."""
        ...

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its optimizer step. All pairs then get a forward pass
        first."""
        ...

    @property
    def sft_coef(self) -> float:
        """Weight of the chosen (or gold) responses' mean negative log-probability."""
        ...

    @property
    def length_alpha(self) -> float:
        """Weight of the longer response's surplus tokens in a pair. 1 treats all tokens alike."""
        ...

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """Return one loss per pair. If `couples` is set, `scores` holds all pairs of the step."""
        ...

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return the implicit rewards of the chosen and of the rejected responses, for the metrics."""
        ...


class OnlinePairAlgorithm(PairAlgorithm, Protocol):
    """Interface of the algorithms on pairs of responses sampled by the policy during the run."""

    @property
    def reference_every(self) -> int | None:
        """Number of steps after which the current policy becomes the reference. None: never."""
        ...

    def pair(self, scores: Sequence[float]) -> tuple[int, int] | None:
        """Return the indices of a prompt's chosen and rejected responses, or None if the prompt yields no pair."""
        ...
