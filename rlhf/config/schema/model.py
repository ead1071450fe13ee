"""Define the model of each role and the low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, Tag

from rlhf.config.schema.services import HttpConfig, ServiceUrl, TokenEnv
from rlhf.objectives.costs import Dtype
from rlhf.sections import NotWith, OnlyIn, Section


class LoraConfig(Section):
    """A low-rank adapter (arXiv:2106.09685). Only the adapter is trained and saved. If vLLM supports it, only the
    adapter is sent to the engines."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear layers to adapt. all-linear: every linear layer except the head."""
    target_parameters: tuple[str, ...] = ()
    """Names of stacked experts of a mixture to adapt besides linear layers: gate_up_proj, down_proj. Each expert gets a
    pair of matrices. The engines get all weights, with the adapter merged."""
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Indices of the transformer blocks to adapt, from 0. null: all blocks."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules to train whole and save with the adapter, such as embed_tokens and lm_head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732), so that the learning rate need not change
    with the rank."""
    dora: bool = False
    """Train each weight's magnitude and direction separately (DoRA, arXiv:2402.09353)."""
    init: Literal["default", "pissa"] = "default"
    """Initial adapter: zero, or the principal components of each weight (PiSSA, arXiv:2404.02948)."""
    lora_plus_ratio: float = Field(default=1.0, gt=0.0)
    """Learning rate of B divided by the learning rate of all other weights (LoRA+, arXiv:2402.12354, suggests 16)."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen linear layers in 4 bits (QLoRA, arXiv:2305.14314). Needs bitsandbytes."""


class ModelConfig(Section):
    """The model of one role."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder, `stage:NAME` (the result of an earlier stage), or `tiny:llama` (the small
    model of the quickstart, created from run.seed). `tiny:qwen3_vl` and other `tiny:KIND` are small vision models."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on the hub. null: the main branch."""
    dtype: Dtype = "bfloat16"
    """Data type of the computation. The default on a CPU without fast bfloat16 instructions is float32. Trained roles
    keep float32 master weights in both cases."""
    trust_remote_code: bool = False
    """Run Python code from the model repository. Set to true only after reading the code."""

    @property
    def source(self) -> str:
        """Return the model to load. A hub name with a revision becomes NAME@REVISION."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    def as_loaded(self) -> Self:
        """Return the section for workers, with `source` as the model."""
        return self.model_copy(update={"model": self.source, "revision": None})


class TrainedModelConfig(ModelConfig):
    """The model of a trained role."""

    lora: LoraConfig | None = None
    """Train a low-rank adapter (and the head of a critic) instead of all weights."""
    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a trained LoRA adapter of this model in peft's format, or `stage:NAME`. Training continues from this
    adapter, and needs `lora: {}` in the same section. Rank, alpha, layers and kind come from the folder, and the
    policy's reference is the model with this adapter."""
    vision_lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Learning rate of the vision tower and the projector or, with `lora`, of their adapters. The rate follows the
    run's schedule. null: the tower and the projector are not trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Recomputing saves memory and takes about a third more time."""
    router_balance_coef: float = Field(default=0.0, ge=0.0)
    """Weight of the loss that balances the load of the experts of a mixture, per sequence (DeepSeek-V3,
    arXiv:2412.19437, eq. 17). The mean over the sequences of an optimizer step is added to the loss. Values from 0.0001
    to 0.01 are usual. 0: no such loss."""


class PolicyConfig(TrainedModelConfig):
    """The trained language model."""

    tokenizer: str | None = Field(default=None, min_length=1)
    """Name or folder of another tokenizer, for example with another chat template. Engines and rewards use this
    tokenizer too, and final/ contains the files. null: the model's tokenizer."""
    router_replay: Annotated[bool, OnlyIn("rollouts")] = False
    """Train with the experts that the sampler's routers chose for each token (R3, arXiv:2510.11370), as recorded in the
    rollouts. Meant for mixtures of experts whose sampler and trainer round differently, as in bfloat16."""

    support_replay: Annotated[bool, OnlyIn("rollouts")] = False
    """Normalise log-probabilities over the tokens that the sampler kept by rollouts.top_k, top_p and min_p, as recorded
    in the rollouts: 8 bytes for each sampled token and each of the top_k. Without this replay, the ratio of each token
    is the probability of all tokens that the sampler kept, and not 1."""

    @property
    def tokenizer_source(self) -> str:
        return self.source if self.tokenizer is None else self.tokenizer


class CriticConfig(TrainedModelConfig):
    """The value model of PPO: a language model's body with a scalar head."""


class ReferenceConfig(ModelConfig):
    """The frozen reference model of the policy."""


OF_A_SERVER = NotWith("url", None, because="the run holds the teacher")


class TeacherConfig(ModelConfig):
    """The frozen teacher of a student: a language model that the run loads, or a model behind a URL with the policy's
    tokenizer."""

    url: ServiceUrl | None = None
    """A server of the teacher that returns vLLM's `prompt_logprobs`, such as `http://127.0.0.1:8702/v1` of
    `rlhf serve`. `model` is then the model's name at the server, and the run holds no teacher. null: the run's workers
    hold the teacher."""
    token_env: Annotated[TokenEnv | None, OF_A_SERVER] = None
    """Environment variable on the driver with the bearer token (API key) of the server."""
    http: Annotated[HttpConfig, OF_A_SERVER] = HttpConfig()
    """Timeouts and limits of requests to the server."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor of the divergence from this teacher, or of the advantages of `sampled_reverse_kl`."""


def has_several_teachers(value: Any) -> bool:
    """Return whether the section `teacher` names teachers, instead of being the section of one teacher."""
    named = value if isinstance(value, Mapping) else {}
    return bool(named.keys() - {"http"}) and all(isinstance(one, Mapping | ModelConfig) for one in named.values())


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Teachers = Annotated[
    Annotated[TeacherConfig, Tag("TeacherConfig")] | Annotated[dict[TeacherName, TeacherConfig], Tag("dict")],
    Discriminator(lambda value: "dict" if has_several_teachers(value) else "TeacherConfig"),
]


class StepScores(Section):
    """A response's score is combined from a process reward model's scores of the steps."""

    combine: Annotated[Literal["min", "mean", "product"], OnlyIn("combined steps")] = "min"
    """How to combine the probabilities of correct steps: their minimum (arXiv:2312.08935), their mean, or their product
    (arXiv:2305.20050)."""
    separator: str = Field(default="\n", min_length=1)
    """Text at the end of every step except the last, as in the training of the model (`algorithm.step_separator`)."""


class MemberConfig(Section):
    """A further reward model of an ensemble, loaded like `reward.model`."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder, or `stage:NAME`."""


class RewardModelConfig(ModelConfig):
    """A sequence-classification model with one label, or the folder of a LoRA adapter of such a model, used by
    `rewards.<name>.role: reward`."""

    members: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], MemberConfig] = Field(default_factory=dict)
    """Further reward models by name, held by the same workers. The score is the mean over all models, and
    `rewards/<name>/disagreement/mean` has the standard deviation."""
    disagreement_coef: Annotated[float, NotWith("members", {}, because="there is a single reward model")] = Field(
        default=0.0, ge=0.0, allow_inf_nan=False
    )
    """Coefficient of the standard deviation over the models, subtracted from their mean."""
    steps: StepScores | None = None
    """Score every step of a response with a process reward model. null: the score is the head's value at the end of the
    response."""

    @property
    def models(self) -> Mapping[str, RewardModelConfig]:
        """Return the model and all members as separate sections, each under the key of its name below `reward`."""
        alone = self.model_copy(update={"members": {}})
        names = {f"members.{name}.model": member.model for name, member in self.members.items()}
        return {"model": alone, **{key: alone.model_copy(update={"model": name}) for key, name in names.items()}}
