"""Distillation trains a student to match a frozen teacher's next-token distributions on given responses.

The method is GKD (arXiv:2306.13649) with fixed data.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind
from rlhf.objectives import distillation as of
from rlhf.sections import OnlyIn, OnlyWith


class TaughtConfig(AlgorithmConfig):
    """Keys of algorithms that learn from the models of `teacher`."""

    teacher_column: Annotated[str | None, OnlyIn("teachers by name")] = Field(default=None, min_length=1)
    """Column of a data row with the name of the row's teacher, for several teachers."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare the teacher's k likeliest tokens, and all other tokens as one outcome. null: the whole vocabulary."""

    @property
    def reads_teacher_states(self) -> bool:
        return True

    @property
    def reads_teacher_heads(self) -> bool:
        """Whether the student computes the teachers' distributions from hidden states."""
        return self.reads_teacher_states and self.top_k is None


class DistillationConfig(TaughtConfig):
    """Distillation from the model of `teacher`. The loss is the mean over all tokens under the loss mask in the
    optimizer step."""

    kind: ClassVar[Kind] = "distillation"
    name: Literal["distillation"]
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student), mode-covering. `reverse_kl`: KL(student || teacher), mode-seeking. `jsd`: a
    divergence between these two, set by beta."""
    beta: Annotated[float, OnlyWith("divergence", "jsd")] = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the teacher in the mixture of `jsd`."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divisor of both models' logits. The loss is not multiplied by the squared temperature."""
    sft_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the negative log-probability of the data's own tokens, at temperature 1."""


class Distillation(Algorithm):
    """The loss is a divergence over the whole vocabulary plus a supervised term.

    A teacher with another tokenizer is compared over spans of text, as in GOLD (rlhf.data.spans). Deviations from TRL's
    GOLD: 1. the sum over spans is divided by the learned tokens of the optimizer step; 2. tokens with the same bytes
    are the same; 3. the ends of both models are a pair; 4. special tokens inside a response, and tokens after the last
    common end, are left out.
    """

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
