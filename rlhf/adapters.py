"""Define what a client's own loop sends to a policy with many adapters and to its engines, and what comes back.

An adapter is a client's LoRA model on the common base model. A policy executes the calls of an adapter in order.
Where ranks train all weights, of one model at a time, this model takes the place of an adapter, with a shape of rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """The shape of a new adapter (arXiv:2106.09685), which starts as the identity."""

    rank: int  # at most the policy's; 0: no adapter, all weights of the model are trained
    alpha: float = 32.0  # the adapter's part is multiplied by alpha / rank
    attention: bool = True  # whether the linear layers of the attention are adapted
    mlp: bool = True  # the same, for the layers between
    seed: int = field(default=0, compare=False)  # of the initial values

    @property
    def trains_all(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        if self.trains_all:
            return "all weights"
        parts = [name for name in ("attention", "mlp") if getattr(self, name)]
        return f"an adapter of {' and '.join(parts)} with rank {self.rank} and alpha {self.alpha:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRows:
    """B rows of a client. Their N = sum(lengths) tokens follow each other in flat columns.

    Unlike elsewhere, a column is aligned to the token that is read: `targets[t]` are scored after token t was read.
    """

    token_ids: Int[Tensor, " N"]  # with images as in rlhf.vision.keys
    lengths: Int[Tensor, " B"]
    targets: Int[Tensor, "N K"]  # K tokens to score at each place; without a meaning before a position of an image
    columns: Mapping[str, Float[Tensor, "N K"]] = field(default_factory=dict)  # such as weights and advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLoss:
    """A loss of rlhf.objectives.client_losses with its settings."""

    name: str
    settings: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCall:
    """A forward and backward pass for an adapter, to be computed together with those of other adapters."""

    adapter: str
    rows: LossRows
    loss: NamedLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """The result of a forward pass over a client's rows."""

    loss: float  # the sum over all rows and targets
    logprobs: Float[Tensor, "N K"]  # of the targets, in the rows' order, in float32; 0 before a position of an image
    metrics: Mapping[str, float] = field(default_factory=dict)  # sums over the tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStep:
    """Settings of AdamW (arXiv:1711.05101) for one optimizer step."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip: float | None = None  # largest norm of the whole gradient; None: no clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A prompt, and how its samples are drawn."""

    token_ids: tuple[int, ...]  # with images as in rlhf.vision.keys
    num_samples: int = 1
    max_tokens: int  # of a sample; at most the engine's longest sequence without the prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int  # sample i is drawn with seed + i
    stop: tuple[str, ...] = ()  # texts that end a sample, and stay in it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end a sample, and stay in it
    ends_at_eos: bool = True  # whether the model's end token ends a sample
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0  # the likeliest tokens to return at each place of the prompt; at most MOST_TOP
    top_logprobs: int = 0  # the same, at each sampled token


MOST_TOP = 128
TopTokens = tuple[tuple[int, float], ...]  # ids and log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSequence:
    """One sample, with the log-probabilities of the sampling distribution."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    top: tuple[TopTokens, ...] | None = None  # at each token, if asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """The samples of a request. The first prompt token and positions of images have no log-probability."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: tuple[float | None, ...] | None = None
    top_prompt: tuple[TopTokens | None, ...] | None = None
