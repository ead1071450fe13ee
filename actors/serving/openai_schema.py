"""Requests and answers of OpenAI's interface, as far as a rollout engine supports them. Pure.

An unsupported field is refused by name. It is ignored only if it asks for nothing, that is if it is null or has its
default value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf.types import FinishReason, Sampling

MOST_SAMPLES = 128  # responses to one prompt
MOST_PROMPTS = 128  # in one request for completions
MOST_STOPS = 64  # stop strings, or stop tokens, of a response
LEAST_LOGPROB = -9999.0  # JSON has no infinity
_ASKS_NOTHING: Mapping[str, Any] = {
    "stream": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "echo": False,
    "best_of": 1,
    "suffix": "",
}
_MESSAGES = {
    "missing": "is missing",
    "string_type": "is not a string",
    "int_type": "is not an integer",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
    "list_type": "is not a list",
    "model_type": "is not an object",
    "model_attributes_type": "is not an object",
}


class Refused(Exception):
    """Raised for a refused request, with OpenAI's error fields."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the field
        self.code = code
        self.status = status

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(_Form):
    """One turn. Its content may come as a list of texts, joined as lines."""

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            match part:
                case {"type": "text", "text": str(text), **rest} if not rest:
                    texts.append(text)
                case _:
                    raise ValueError('has a part that is not {"type": "text", "text": ...}: images are not supported')
        return "\n".join(texts)


class Structure(_Form):
    """The allowed form of a response: one of these strings."""

    choice: list[str] = Field(min_length=1, max_length=1000)

    @field_validator("choice")
    @classmethod
    def _printable(cls, value: list[str]) -> list[str]:
        if not all(text and text.isprintable() for text in value):
            raise ValueError("must have only non-empty strings of printable characters on one line")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response in the form of the answer."""

    text: str  # up to the stop string
    finish_reason: FinishReason
    tokens: tuple[tuple[str, float], ...]  # of the text, with their log-probabilities
    num_tokens: int  # sampled tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The responses to one prompt, with its token count."""

    num_prompt_tokens: int
    answers: tuple[Answer, ...]


class _Request(_Form):
    """The fields of both kinds of requests."""

    model: str
    n: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    temperature: float = 1.0
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: list[str] = Field(default=[], max_length=MOST_STOPS)
    # Not OpenAI's; vLLM's server has them too:
    top_k: int | None = Field(default=None, ge=1)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default=[], max_length=MOST_STOPS)
    structured_outputs: Structure | None = None

    @field_validator("temperature")
    @classmethod
    def _in_range(cls, value: float, info: ValidationInfo) -> float:
        if value != 0.0 and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
            raise ValueError(f"is {value}, expected 0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}")
        if value == 0.0 and info.data.get("n", 1) > 1:
            raise ValueError(f"is 0 with n {info.data['n']}, but greedy responses to one prompt are all equal")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("has an empty string")
        return value

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return the sampling parameters for the engine."""
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=tuple(self.stop_token_ids),
            stop=tuple(self.stop),
            choices=() if self.structured_outputs is None else tuple(self.structured_outputs.choice),
        )


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False

    @field_validator("messages")
    @classmethod
    def _ends_before_the_answer(cls, value: list[Message]) -> list[Message]:
        if value[-1].role == "assistant":
            raise ValueError("end with the assistant's turn, which the model has to write")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _agrees(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if None not in (value, other) and value != other:
            raise ValueError(f"is {value}, but max_tokens is {other}; give only one of them")
        return value

    @property
    def limit(self) -> int | None:
        """Return the maximum number of tokens in a response. None: all remaining room."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def texts(self) -> list[str]:
        """Return the texts to tokenize."""
        return [message.content for message in self.messages]

    @property
    def wants_tokens(self) -> bool:
        return self.logprobs


class TextRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: list[str] = Field(min_length=1, max_length=MOST_PROMPTS)
    max_tokens: int = Field(default=16, ge=1)
    logprobs: Literal[0] | None = None  # 0: of the sampled tokens

    @field_validator("prompt", mode="before")
    @classmethod
    def _listed_prompt(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def limit(self) -> int:
        """Return the maximum number of tokens in a response."""
        return self.max_tokens

    @property
    def texts(self) -> list[str]:
        """Return the texts to tokenize."""
        return self.prompt

    @property
    def wants_tokens(self) -> bool:
        return self.logprobs is not None


R = TypeVar("R", ChatRequest, TextRequest)


def read(text: str, form: type[R]) -> R:
    """Parse a request's body. Refused: the body is invalid, or asks for an unsupported feature."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, nothing in _ASKS_NOTHING.items():
        if name in given and name not in form.model_fields and given[name] == nothing:
            del given[name]
    for name in given:
        if name not in form.model_fields:
            raise _not_done(name, given[name], form)
    try:
        return form.model_validate(given)
    except ValidationError as error:
        raise _wrong(error, given) from error


def _not_done(name: str, value: object, form: type[BaseModel]) -> Refused:
    if name in _ASKS_NOTHING:
        return Refused(
            f"`{name}` is {_short(value)}, but this server supports {_short(_ASKS_NOTHING[name])} only", param=name
        )
    return Refused(f"`{name}` is not supported here; there are {', '.join(form.model_fields)}", param=name)


def _wrong(error: ValidationError, given: Mapping[str, Any]) -> Refused:
    """Return the first error of an invalid body, with its place."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return Refused(f"`{place}` is not supported here", param=place)
    message = _MESSAGES.get(first["type"])
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    elif message is None:
        message = f"is {_short(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return Refused(f"`{place}` {message}", param=place)


def _short(value: object) -> str:
    return f"{json.dumps(value):.80}"


def answer_body(
    request: ChatRequest | TextRequest, answered_prompts: Sequence[Answered], *, name: str, created: int
) -> dict[str, Any]:
    """Return the answer to a request: n choices to the first prompt, then to the next."""
    answers = [answer for answered in answered_prompts for answer in answered.answers]
    num_prompt_tokens = sum(answered.num_prompt_tokens for answered in answered_prompts)
    num_sampled = sum(answer.num_tokens for answer in answers)
    is_chat = isinstance(request, ChatRequest)
    choice = _chat_choice if is_chat else _text_choice
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": [
            {"index": index, **choice(answer, request.wants_tokens), "finish_reason": answer.finish_reason}
            for index, answer in enumerate(answers)
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt_tokens + num_sampled,
        },
    }


def _chat_choice(answer: Answer, has_logprobs: bool) -> dict[str, Any]:
    tokens = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logprob in answer.tokens
    ]
    return {
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": {"content": tokens, "refusal": None} if has_logprobs else None,
    }


def _text_choice(answer: Answer, has_logprobs: bool) -> dict[str, Any]:
    tokens = [token for token, _ in answer.tokens]
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [logprob for _, logprob in answer.tokens],
        "top_logprobs": None,
        "text_offset": [sum(map(len, tokens[:index])) for index in range(len(tokens))],
    }
    return {"text": answer.text, "logprobs": logprobs if has_logprobs else None}
