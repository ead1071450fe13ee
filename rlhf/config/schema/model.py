"""Which model a role holds and how it is adapted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt

from rlhf.algorithms.section import Section

Dtype = Literal["float32", "bfloat16"]


class LoraConfig(Section):
    """A low-rank adapter (arXiv:2106.09685): only it is trained and saved, and where vLLM takes it, shipped alone."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear layers to adapt, or all of them but the head."""
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Numbers of the transformer blocks to adapt, from 0. null: all."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules to train whole and save with the adapter, such as embed_tokens and lm_head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732), so that the rate need not change with the rank."""
    dora: bool = False
    """Train each weight's magnitude apart from its direction (DoRA, arXiv:2402.09353)."""
    init: Literal["default", "pissa"] = "default"
    """What the adapter begins as: nothing, or the principal part of each weight (PiSSA, arXiv:2404.02948)."""
    lora_plus_ratio: float = Field(default=1.0, gt=0.0)
    """Learning rate of B as a multiple of that of all else (LoRA+, arXiv:2402.12354, which suggests 16)."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen linear layers in 4 bits (QLoRA, arXiv:2305.14314). Needs bitsandbytes."""


class ModelConfig(Section):
    """One role's model."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder, `stage:NAME` (the result of an earlier stage), or `tiny:llama`
    (the quickstart's model, made on the spot from run.seed)."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on the hub. null: its main branch."""
    dtype: Dtype = "bfloat16"
    """Compute type. Trained roles keep float32 master weights either way."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    @property
    def source(self) -> str:
        """The model as it is loaded: a hub name with a revision is NAME@REVISION."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    def as_loaded(self) -> Self:
        """The section with `source` as its model, as workers take it."""
        return self.model_copy(update={"model": self.source, "revision": None})


class PolicyConfig(ModelConfig):
    """The trained language model."""

    tokenizer: str | None = Field(default=None, min_length=1)
    """Name or folder of a tokenizer to use instead of the model's own, such as one with another chat template. Engines
    and rewards use it too, and final/ holds it. null: the model's own."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights."""
    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a trained LoRA adapter of this model that training continues, as peft saves it, or `stage:NAME`. It
    needs `lora: {}` in the same section. Rank, alpha, layers and kind are the folder's, and the reference is the model
    with this adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer of the whole run is loaded from."""
        return self.source if self.tokenizer is None else self.tokenizer


class CriticConfig(ModelConfig):
    """The value model of PPO: a language model's body with a scalar head."""

    lora: LoraConfig | None = None
    """Train a low-rank adapter and the value head instead of all weights."""
    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a trained LoRA adapter of this model that training continues, or `stage:NAME`. It needs `lora: {}` in
    the same section."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class ReferenceConfig(ModelConfig):
    """The frozen model that the policy is compared with."""


class TeacherConfig(ModelConfig):
    """The frozen model that a student learns from: a language model with the policy's tokenizer."""


class StepScores(Section):
    """A response is worth what a process reward model says of its steps."""

    combine: Literal["min", "mean", "product"] = "min"
    """What is made of the probabilities that the steps are right: the lowest (arXiv:2312.08935), their mean, or their
    product (arXiv:2305.20050)."""
    separator: str = Field(default="\n", min_length=1)
    """Ends every step but the last, as in the model's training (`algorithm.step_separator`)."""


class RewardModelConfig(ModelConfig):
    """A sequence-classification model with one label, or the folder of a LoRA adapter of one, used by
    `rewards.<name>.role: reward`."""

    steps: StepScores | None = None
    """Take a process reward model's word for every step of a response; null: the head's value at its end alone."""
