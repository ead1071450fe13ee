"""Define the input and the output of the process of suites. Plain values, sent as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.templates import UNCHANGED, ChatTemplate

MODEL = "suites"  # the name of the model in requests
LOST = "the engine does not answer"  # the beginning of the reason, if a later attempt may help


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSpec:
    """The suites for one model."""

    names: tuple[str, ...]
    limit: int | None = None  # questions of each task; None: all
    data: str | None = None  # the folder with copies of data sets; None: from the hub or its cache
    seed: int = 0
    tokenizer: str  # hub name or folder
    trust_remote_code: bool = False
    template: ChatTemplate = UNCHANGED
    apply_chat_template: bool = True  # no effect on a tokenizer without a template
    max_length: int | None = None  # tokens of prompt and response; a longer prompt loses its beginning. None: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The fronts of all engines with one model."""

    urls: tuple[str, ...]
    key: str
    deadline_s: float  # from a request to its answer
    answers: Path  # a file with answers of an interrupted process, read and continued


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitePlan:
    questions: int
    longest: int  # tokens of a prompt and its response


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of a suite with the model's answer."""

    number: int  # place in the suite
    task: str | None  # the part of the suite; None: the suite has a single part
    prompt: str
    response: str  # of a choice by likelihood: the likeliest continuation
    target: str  # the right answer, or its number among the choices
    score: float | None  # of the first metric that is better if higher; None: there is none
    values: Mapping[str, float]  # by metric, under the library's names
    truncated: bool
    response_tokens: int
    failure: str | None  # why there is no answer; the question counts in no metric


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteAnswers:
    """A suite with all answers."""

    name: str
    questions: tuple[Question, ...]
    totals: Mapping[str, float] = field(default_factory=dict)
    # metrics of a single task that are no mean over questions, as the library computes them
