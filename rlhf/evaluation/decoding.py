"""Define the decoding settings and the responses of `rlhf generate` and `rlhf eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf.data.templates import UNCHANGED, ChatTemplate, read_template
from rlhf.errors import UserError
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Settings for reading prompts and sampling responses. UserError for a value out of range.

    Args:
        samples (N): responses to each prompt.
        temperature (T): the sampling temperature; 0 is greedy decoding.
        top_p (P): nucleus sampling; 1 keeps all tokens.
        top_k (K): sample among the k likeliest tokens.
        min_p (P): the least probability of a token relative to the likeliest token; 0 keeps all tokens.
        repetition_penalty (X): above 1, tokens of the prompt and the response become less likely.
        max_new_tokens (N): the maximum number of tokens in a response.
        stop (TEXT): a string that ends a response and remains in it; may be repeated.
        stop_token_ids (ID): a token that ends a response; may be repeated.
        seed (N): the seed of sampling and of confidence intervals.
        system_prompt (TEXT): the system prompt in the chat template; an empty prompt is left out.
        apply_chat_template: write string prompts by the chat template, or pass string prompts to the model unchanged.
        chat_template (FILE): a Jinja file in place of the model's chat template.
        template (JSON): variables of the chat template, such as '{"enable_thinking": false}'.
        columns (OURS=THEIRS): read our column from the column THEIRS of the data; may be repeated.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    system_prompt: str | None = None
    apply_chat_template: bool = True
    chat_template: str | None = None
    template: ChatTemplate = UNCHANGED
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chat_template is not None:
            text = read_template(self.chat_template, key="chat_template")
            object.__setattr__(self, "template", replace(self.template, text=text))
        _check("samples", self.samples, "1 to 10000", 1 <= self.samples <= 10_000)
        is_possible = self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE
        rule = f"0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        _check("temperature", self.temperature, rule, is_possible)
        _check("top_p", self.top_p, "above 0, up to 1", 0.0 < self.top_p <= 1.0)
        _check("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1)
        _check("min_p", self.min_p, "0 to 1", 0.0 <= self.min_p <= 1.0)
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "above 0, up to 10", 0.0 < penalty <= 10.0)
        _check("stop_token_ids", self.stop_token_ids, "0 or more", all(token >= 0 for token in self.stop_token_ids))
        _check("max_new_tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1)
        _check("seed", self.seed, "0 to 4294967295", 0 <= self.seed < 2**32)
        _check("stop", self.stop, "strings that are not empty", all(self.stop))
        if self.samples > 1 and self.temperature == 0.0:
            equal = "greedy responses to one prompt are all equal"
            raise UserError(f"samples: is {self.samples}, but {equal}; give a temperature above 0")
        if self.system_prompt is not None and not self.apply_chat_template:
            raise UserError("system_prompt: has no effect without the chat template, which puts it before the prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A response to a prompt, as text with token counts."""

    prompt_id: int  # row of the data
    sample: int  # index among the responses to this prompt
    prompt: str  # as passed to the tokenizer
    response: str  # without end tokens
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    response_tokens: int


def _check(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise UserError(f"{name}: is {value}, expected {rule}")
