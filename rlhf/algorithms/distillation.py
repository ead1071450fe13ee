"""Distillation trains a student to match a frozen teacher's next-token distributions on given responses.

The method is GKD (arXiv:2306.13649) with fixed data.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind
from rlhf.objectives import distillation as of
from rlhf.sections import OnlyWith


class DistillationConfig(AlgorithmConfig):
    """Distillation from the model of `teacher`. The loss is the mean over all tokens under the loss mask in the
    optimizer step."""

    kind: ClassVar[Kind] = "distillation"
    name: Literal["distillation"]
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student), mode-covering. `reverse_kl`: KL(student || teacher), mode-seeking. `jsd`:
    between the two, by beta."""
    beta: Annotated[float, OnlyWith("divergence", "jsd")] = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the teacher in the mixture of `jsd`."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divisor of both models' logits. The loss is not multiplied by the squared temperature."""
    sft_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the negative log-probability of the data's own tokens, at temperature 1."""


class Distillation(Algorithm):
    """The loss is a divergence over the whole vocabulary plus a supervised term."""

    config: DistillationConfig

    @property
    def divergence(self) -> of.Divergence:
        """Return the divergence of two distributions."""
        return divergence_of(self.config.divergence, beta=self.config.beta)


def divergence_of(name: str, *, beta: float) -> of.Divergence:
    """Return the configured divergence. Only `jsd` uses beta."""
    by_name: dict[str, of.Divergence] = {
        "forward_kl": of.forward_kl,
        "reverse_kl": of.reverse_kl,
        "jsd": partial(of.generalized_jsd, beta=beta),
    }
    return by_name[name]
