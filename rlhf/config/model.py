"""Which model a role holds and how it is adapted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.algorithms.section import Section

Dtype = Literal["float32", "bfloat16"]


class LoraConfig(Section):
    """A low-rank adapter (arXiv:2106.09685): only it is trained, shipped to the engines and saved."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt, or all of them but the head."""


class ModelConfig(Section):
    """One role's model."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder, `stage:NAME` (the result of an earlier stage), or `tiny:llama`
    (the quickstart's model, made on the spot from run.seed)."""
    dtype: Dtype = "bfloat16"
    """Compute type. Trained roles keep float32 master weights either way."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class PolicyConfig(ModelConfig):
    """The trained language model."""

    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class CriticConfig(ModelConfig):
    """The value model of PPO: a language model's body with a scalar head."""

    lora: LoraConfig | None = None
    """Train a low-rank adapter and the value head instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class ReferenceConfig(ModelConfig):
    """The frozen model that the KL penalty is measured against."""


class RewardModelConfig(ModelConfig):
    """A sequence-classification model with one label, used by `rewards.<name>.role: reward`."""
