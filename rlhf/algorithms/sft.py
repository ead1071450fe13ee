"""Supervised fine-tuning is cross-entropy on the tokens under the loss mask."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.algorithms.algorithm import Algorithm, AlgorithmConfig, Kind


class SFTConfig(AlgorithmConfig):
    """Supervised fine-tuning. The loss is the mean over all tokens under the loss mask in the optimizer step."""

    kind: ClassVar[Kind] = "supervised"
    name: Literal["sft"]
    loss: Literal["nll", "dft"] = "nll"
    """`nll`: cross-entropy. `dft`: cross-entropy times the token's probability (arXiv:2508.05629)."""
    neftune_alpha: float | None = Field(default=None, gt=0.0)
    """Noise on the input embeddings during training (NEFTune, arXiv:2310.05914); 5 is usual; null: no noise."""


class SFT(Algorithm):
    """The worker computes the loss together with the vocabulary head."""

    config: SFTConfig
