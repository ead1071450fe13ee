"""DPO (arXiv:2305.18290) and its variants train on the log-ratios of a chosen and a rejected response.

The reference is the policy before training. The reference's log-probabilities are computed once and stored on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from rlhf.algorithms.algorithm import UnusedKey
from rlhf.algorithms.pairs import PairAlgorithm, PairScores, PreferenceConfig
from rlhf.deferred import Float, Tensor
from rlhf.objectives import divergences
from rlhf.objectives import preference_loss as of
from rlhf.sections import OnlyWith

DPOLoss = Literal[
    "sigmoid", "robust", "ipo", "hinge", "exo", "nca", "bco", "sppo", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop",
]  # fmt: skip
SMOOTHED = frozenset({"sigmoid", "robust", "exo", "aot", "aot_unpaired"})  # losses with label_smoothing
COUPLED = frozenset({"aot", "aot_unpaired", "bco"})  # losses of all pairs of a step
OF_MARGINS = frozenset({"sigmoid", "robust", "ipo", "hinge", "discopop"})  # losses for other divergences


class LogRatioConfig(PreferenceConfig):
    """Losses of the log-ratios, with their weights and parameters."""

    loss: DPOLoss | dict[str, float] = "sigmoid"
    """The loss of a pair, or several with their weights (MPO, arXiv:2411.10442). The equations: docs/algorithms.md."""
    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the constraint towards the reference: the implicit reward is beta times the log-ratio."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of pairs with a wrong preference (cDPO with `sigmoid`); `exo` needs more than 0."""
    length_normalize: bool = False
    """Use the mean log-ratio per token instead of the sum over a response (Tulu 3, arXiv:2411.15124; IPO as run by the
    authors)."""
    length_alpha: float = Field(default=1.0, ge=0.0, le=1.0)
    """Weight of the tokens by which the longer response of a pair exceeds the shorter response (LD-DPO,
    arXiv:2409.06411)."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    """Divergence from the reference (f-DPO, arXiv:2309.16240)."""
    divergence_alpha: Annotated[float, OnlyWith("divergence", "alpha")] = Field(default=0.5, ge=0.0, lt=1.0)
    """alpha of the alpha-divergence: 0 is the forward KL, and values near 1 approach the reverse KL."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Return each loss with a weight."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = set(self.losses)
        if not names:
            raise ValueError("`loss` is an empty mapping; name at least one loss")
        if unknown := sorted(names - set(get_args(DPOLoss))):
            raise ValueError(f"`loss` has {unknown[0]!r}, expected names among {', '.join(get_args(DPOLoss))}")
        if not all(0.0 < weight < math.inf for weight in self.losses.values()):
            raise ValueError(f"`loss` has the weights {dict(self.losses)}, expected numbers above 0")
        if self.length_alpha < 1.0 and (self.length_normalize or self.sft_coef):
            other = "length_normalize" if self.length_normalize else "sft_coef"
            raise ValueError(f"`length_alpha` below 1 contradicts `{other}`; use only one of them")
        if "exo" in names and self.label_smoothing == 0.0:
            raise ValueError("`loss: exo` needs `label_smoothing` above 0; a usual value is 0.001")
        if self.wpo and COUPLED & names:
            coupled = ", ".join(sorted(COUPLED & names))
            raise ValueError(f"`wpo` weights single pairs, but `loss: {coupled}` depends on all pairs; use only one")
        if self.divergence != "reverse_kl" and not names <= OF_MARGINS:
            others = ", ".join(sorted(names - OF_MARGINS))
            raise ValueError(f"`divergence` works only with loss {', '.join(sorted(OF_MARGINS))}, not with {others}")
        return self

    @property
    def uses_reference(self) -> bool:
        return True  # the losses are of log-ratios

    def unused_keys(self) -> Iterator[UnusedKey]:
        """Yield label_smoothing unless read by a loss."""
        if not SMOOTHED & set(self.losses):
            why = f"algorithm.loss {', '.join(self.losses)} does not read it"
            yield UnusedKey(key="label_smoothing", why=why, fix=f"use one of {', '.join(sorted(SMOOTHED))}")


class LogRatioAlgorithm(PairAlgorithm):
    """The loss is a weighted sum of losses of a pair's log-ratios.

    Deviation from BCO's paper: delta is the mean reward of the optimizer step, not a running mean.
    """

    config: LogRatioConfig

    def __init__(self, config: LogRatioConfig) -> None:
        super().__init__(config)
        self.length_alpha = config.length_alpha
        self.couples = bool(COUPLED & set(config.losses))

    def losses(self, scores: PairScores) -> Float[Tensor, " B"]:
        log_ratios = self._log_ratios(scores)
        total = log_ratios[0].new_zeros(log_ratios[0].shape)
        for name, weight in self.config.losses.items():
            columns = self._margins(scores) if name == "aot" else log_ratios
            options = {"label_smoothing": self.config.label_smoothing} if name in SMOOTHED else {}
            total = total + weight * of.LOSSES[name](*columns, beta=self.config.beta, **options)
        return total

    def rewards(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return beta times the log-ratios."""
        chosen, rejected = self._log_ratios(scores)
        return self.config.beta * chosen, self.config.beta * rejected

    def _log_ratios(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        assert scores.ref_chosen is not None
        assert scores.ref_rejected is not None
        chosen, rejected = scores.chosen - scores.ref_chosen, scores.rejected - scores.ref_rejected
        if self.config.length_normalize:
            chosen, rejected = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
        if self.config.divergence == "reverse_kl":
            return chosen, rejected
        transforms: dict[str, Callable[[Tensor], Tensor]] = {
            "forward_kl": divergences.forward_kl_scores,
            "jensen_shannon": divergences.jensen_shannon_scores,
            "alpha": partial(divergences.alpha_divergence_scores, alpha=self.config.divergence_alpha),
        }
        transform = transforms[self.config.divergence]
        return transform(chosen), transform(rejected)

    def _margins(self, scores: PairScores) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return log pi(chosen) - log pi(rejected) for the policy and for the reference."""
        assert scores.ref_chosen is not None
        assert scores.ref_rejected is not None
        c, r = (scores.chosen_tokens, scores.rejected_tokens) if self.config.length_normalize else (1.0, 1.0)
        return scores.chosen / c - scores.rejected / r, scores.ref_chosen / c - scores.ref_rejected / r


class DPOConfig(LogRatioConfig):
    """Direct preference optimisation, with a reference model."""

    name: Literal["dpo"]


class DPO(LogRatioAlgorithm):
    """The pairs are given, and the reference is the policy before training."""

    config: DPOConfig
