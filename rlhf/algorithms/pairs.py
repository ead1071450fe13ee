"""What the algorithms on pairs of responses share: the numbers they read, their knobs, and what a worker asks of them.

A pair's numbers are sums of log-probabilities over the learnt tokens (a policy) or the head's scores (a reward model).
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
    chosen_tokens: Float[Tensor, " B"]  # learnt tokens of each response
    rejected_tokens: Float[Tensor, " B"]
    ref_chosen: Float[Tensor, " B"] | None  # the reference's; None: the algorithm has none
    ref_rejected: Float[Tensor, " B"] | None
    margins: Float[Tensor, " B"]  # of the data; 0 where it names none
    gold: Float[Tensor, " B"] | None = None  # None: the algorithm imitates the chosen response, if any
    weights: Float[Tensor, " B"] | None = None  # of the pairs' losses; None: all 1


class PreferenceConfig(Section):
    """What every algorithm that trains a policy on pairs has."""

    sft_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the mean negative log-probability of the chosen responses' tokens (RPO, arXiv:2404.19733)."""
    wpo: bool = False
    """Each pair's loss (not the supervised term) times how likely both responses are to come from the policy as it is
    (WPO, arXiv:2406.11827)."""


class PairAlgorithm(Protocol):
    """What differs between the algorithms on pairs."""

    @property
    def needs_reference(self) -> bool:
        """Whether the losses read the log-probabilities of the policy before training."""
        ...

    @property
    def needs_gold(self) -> bool:
        """Whether a row has a third, gold response, which takes the chosen one's place in the supervised term."""
        ...

    @property
    def wpo(self) -> bool:
        """Whether a pair's loss is multiplied by the on-policy weights of its responses."""
        ...

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its optimizer step: they are then all looked at first."""
        ...

    @property
    def sft_coef(self) -> float:
        """Weight of the chosen (or gold) responses' mean negative log-probability."""
        ...

    @property
    def length_alpha(self) -> float:
        """Weight of the tokens by which the longer response of a pair exceeds the shorter; 1: as all others."""
        ...

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        """One loss a pair; of an algorithm that couples them, over all pairs of the step."""
        ...

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """What the model makes of the chosen and of the rejected responses, for the metrics."""
        ...


class OnlinePairAlgorithm(PairAlgorithm, Protocol):
    """One whose pairs are responses that the policy gave during the run."""

    @property
    def reference_every(self) -> int | None:
        """Steps after which the reference becomes the policy as it is then; None: never."""
        ...

    def pair(self, scores: Sequence[float]) -> tuple[int, int] | None:
        """Which of a prompt's responses are chosen and rejected; None: it has no pair."""
        ...
