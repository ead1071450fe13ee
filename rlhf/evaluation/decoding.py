"""How a model on disk is asked, and what it answers: the words of `rlhf generate` and `rlhf eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.errors import UserError
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How responses are drawn, and how prompts are read. UserError for a value out of its range."""

    samples: int = 1  # responses to a prompt
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # 1 keeps all tokens
    top_k: int | None = None  # None keeps all tokens
    min_p: float = 0.0  # least probability of a token, as a share of the likeliest one's
    repetition_penalty: float = 1.0  # above 1: tokens that the prompt or the response has are less likely
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings that end a response; they stay in it
    stop_token_ids: tuple[int, ...] = ()  # tokens that do
    seed: int = 0
    system_prompt: str | None = None
    apply_chat_template: bool = True  # False: string prompts go to the model as they are
    template: ChatTemplate = UNCHANGED  # what is changed about the model's chat template
    columns: Mapping[str, str] = field(default_factory=dict)  # our column name: the data's name for it

    def __post_init__(self) -> None:
        _refuse("samples", self.samples, "1 to 10000", 1 <= self.samples <= 10_000)
        is_possible = self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE
        rule = f"0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        _refuse("temperature", self.temperature, rule, is_possible)
        _refuse("top_p", self.top_p, "above 0, up to 1", 0.0 < self.top_p <= 1.0)
        _refuse("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1)
        _refuse("min_p", self.min_p, "0 to 1", 0.0 <= self.min_p <= 1.0)
        penalty = self.repetition_penalty
        _refuse("repetition_penalty", penalty, "above 0, up to 10", 0.0 < penalty <= 10.0)
        _refuse("stop_token_ids", self.stop_token_ids, "0 or more", all(token >= 0 for token in self.stop_token_ids))
        _refuse("max_new_tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1)
        _refuse("seed", self.seed, "0 to 4294967295", 0 <= self.seed < 2**32)
        _refuse("stop", self.stop, "strings that are not empty", all(self.stop))
        if self.samples > 1 and self.temperature == 0.0:
            raise UserError(
                f"samples: is {self.samples}, but greedy responses to one prompt are all equal; "
                "give a temperature above 0"
            )
        if self.system_prompt is not None and not self.apply_chat_template:
            raise UserError("system_prompt: has no effect without the chat template, which puts it before the prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One response."""

    prompt_id: int  # row of the data
    sample: int  # which of the responses to this prompt
    prompt: str  # as the tokenizer was given it
    response: str  # without the special tokens that end it
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    response_tokens: int


def _refuse(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise UserError(f"{name}: is {value}, expected {rule}")
