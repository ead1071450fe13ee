"""Translate the JSON bodies of the protocol into calls of a policy and of engines.

Unknown and unsupported fields are refused by name, so no wish of a client is ignored silently.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.adapters import MOST_TOP, AdamStep, AdapterShape, SampleRequest
from rlhf.errors import UserError
from rlhf.hosting.images import ClientImages

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")
LEAST_TTL_S, MOST_TTL_S = 3600, 10 * 366 * 86400


class Body(BaseModel):
    """The body of a request. The client writes the field `type` into every body."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    type: str | None = None

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Return the checked body. UserError names the first wrong field."""
        try:
            return cls.model_validate_json(body or b"{}")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the body"
            if first["type"] == "extra_forbidden":
                raise UserError(f"{place}: this server does not support the field") from error
            raise UserError(f"{place}: {first['msg']}, got {first['input']!r:.80}") from error


def canonical(body: bytes, images: ClientImages | None = None) -> bytes:
    """Return a checked body in the same form for every repetition of a request.

    images: keep the images of the request's prompt, whose names take the place of the bytes.
    """
    try:
        values = json.loads(body)
        if images is not None:
            images.keep_all(values["prompt"]["chunks"])
        return json.dumps(values, sort_keys=True).encode()
    except (ValueError, RecursionError) as error:  # JSON for pydantic, which skips unread fields
        raise UserError(f"the body: {error}") from error


def number_of(text: str) -> int | None:
    """Return a number in an address. None: the text is no number, or too long for an index."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


class CreateSession(Body):
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class SessionOnly(Body):
    session_id: str


class FinishSession(Body):
    model_config = ConfigDict(extra="allow", frozen=True)  # the client's reason


class ModelOnly(Body):
    model_id: str


class LoraBody(Body):
    rank: int = Field(ge=0)  # 0: all weights
    seed: int | None = None
    train_unembed: bool = True  # without effect: the server says so when a session begins
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "adamw"


class CreateModel(Body):
    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraBody | None = None
    optimizer_config: OptimizerBody = OptimizerBody()


class LoadWeights(Body):
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerBody | None = None
    weights_access_token: None = None


class Adam(Body):
    learning_rate: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-12, gt=0.0, allow_inf_nan=False)  # 0 would divide zero by zero
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    grad_clip_norm: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)


class OfModel(Body):
    model_id: str
    seq_id: int = Field(ge=1)


class Addressed(OfModel):
    """The place of a request in a model's line. All else is checked in the request's turn."""

    model_config = ConfigDict(extra="ignore")


class OptimStep(OfModel):
    adam_params: Adam | None = None
    optimizer_params: OptimizerBody | None = None


class Stored(OfModel):
    user_metadata: dict[str, str] | None = None
    ttl_seconds: int | None = Field(default=None, ge=LEAST_TTL_S, le=MOST_TTL_S)


class SaveWeights(Stored):
    path: str | None = None
    overwrite: bool = False


class SaveForSampler(Stored):
    path: str | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0)
    kind: str = "snapshot"


class SaveExternal(Stored):
    path: str
    age_encryption_recipients: tuple[str, ...] | None = None


class CreateSampler(Body):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0)
    base_model: str | None = None
    model_path: str | None = None


class JoinSampler(Body):
    sampling_session_id: str


class Chunk(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)  # so that a refused chunk can be named

    type: str = "encoded_text"
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    data: str = ""  # bytes of an image
    format: str = ""
    expected_tokens: int | None = None


class PromptBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    chunks: tuple[Chunk, ...]


class SamplingParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | tuple[int, ...] | tuple[str, ...] | None = None
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_k: int = Field(default=-1, lt=1 << 31)  # of vLLM
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)


class Sample(Body):
    sampling_session_id: str | None = None
    seq_id: int | None = Field(default=None, ge=0)
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt: PromptBody
    sampling_params: SamplingParams = SamplingParams()
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0, le=MOST_TOP)
    topk_sample_logprobs: int = Field(default=0, ge=0, le=MOST_TOP)
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    record_stability_info: bool | None = None


class Future(Body):
    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = 0


class Futures(Body):
    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: tuple[str, ...] = ()


class TinkerPath(Body):
    tinker_path: str


class TimeToLive(Body):
    ttl_seconds: Annotated[int, Field(ge=LEAST_TTL_S, le=MOST_TTL_S)] | None = None


def adapter_shape(lora: LoraBody | None, *, seed: int) -> AdapterShape:
    """Return the shape of a client's model. Without an adapter, or with rank 0, all weights are trained."""
    if lora is None:
        return AdapterShape(rank=0)
    if lora.rank == 0 and not (lora.train_mlp and lora.train_attn):
        raise UserError("lora_config: rank 0 trains all weights, so train_mlp and train_attn must be true")
    if lora.rank == 0:
        return AdapterShape(rank=0)
    if not (lora.train_mlp or lora.train_attn):
        raise UserError("lora_config: train_mlp and train_attn are both false, so nothing would be trained")
    chosen = seed if lora.seed is None else lora.seed
    return AdapterShape(rank=lora.rank, attention=lora.train_attn, mlp=lora.train_mlp, seed=chosen)


def refuse_other_optimizer(optimizer: OptimizerBody | None) -> None:
    if optimizer is not None and optimizer.type != "adamw":
        raise UserError(f"the optimizer {optimizer.type} is not supported here; use adamw (tinker.AdamParams)")


def adam_step(body: OptimStep) -> AdamStep:
    """Return the settings of an optimizer step. UserError: another optimizer than Adam."""
    refuse_other_optimizer(body.optimizer_params)
    adam = body.adam_params
    if adam is None:
        raise UserError("adam_params is missing; use adamw (tinker.AdamParams)")
    return AdamStep(
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip=adam.grad_clip_norm or None,
    )


def sample_request(body: Sample, images: ClientImages, *, seed: int, max_length: int) -> SampleRequest:
    """Return the call of the engines for a request with kept images. `seed` is used if the client gave no seed."""
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k"):
        if getattr(body, name):
            raise UserError(f"{name} is not supported here")
    if body.record_stability_info:
        raise UserError("record_stability_info is not supported here; train with another loss than stable_reinforce")
    tokens: list[int] = []
    images.refuse_many(sum(chunk.type == "image" for chunk in body.prompt.chunks), place="prompt")
    for chunk in body.prompt.chunks:
        if chunk.type == "image":
            tokens += images.token_ids(chunk.data, chunk.format, chunk.expected_tokens, place="prompt")
        elif chunk.type == "encoded_text":
            tokens += chunk.tokens
        elif chunk.type == "image_asset_pointer":
            raise UserError(
                "prompt: has the address of an image (image_asset_pointer), and this server fetches no images. "
                "Read the file in the client, and send its bytes as an ImageChunk."
            )
        else:
            raise UserError(f"prompt: has a chunk of the kind {chunk.type}; this server takes encoded_text and image")
    params = body.sampling_params
    if not 0 < len(tokens) < max_length:
        raise UserError(
            f"prompt: has {len(tokens)} tokens, and this server takes 1 to {max_length - 1} (service.max_length)"
        )
    if body.prompt_logprobs_last_n is not None and not body.prompt_logprobs:
        raise UserError("prompt_logprobs_last_n needs prompt_logprobs")
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop or ()
    if "" in stop:
        raise UserError("sampling_params.stop: has an empty text; leave it out")
    return SampleRequest(
        token_ids=tuple(tokens),
        num_samples=body.num_samples,
        max_tokens=min(params.max_tokens or max_length, max_length - len(tokens)),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k if params.top_k > 0 else None,
        seed=seed if params.seed is None else params.seed,
        stop=tuple(word for word in stop if isinstance(word, str)),
        stop_token_ids=tuple(token for token in stop if isinstance(token, int)),
        ends_at_eos=params.stop is None,
        prompt_logprobs=bool(body.prompt_logprobs),
        top_prompt_logprobs=body.topk_prompt_logprobs,
        top_logprobs=body.topk_sample_logprobs,
    )


def checkpoint_name(name: str | None, *, seq_id: int) -> str:
    """Return the name of a checkpoint. UserError: the name cannot be a folder's name."""
    if name is None:
        return f"seq{seq_id:06d}"
    if not _NAME.fullmatch(name):
        raise UserError(f"path: {name!r:.140} must be 1 to 128 letters, digits, dots, hyphens and underscores")
    return name
