"""Built-in rewards: the table of all, and rules that compare a response with a column of its data row.

The rules here give 1.0 for right and 0.0 for wrong, but `reasoning_gym`, which gives its task's partial credit. They
run in reward processes like a user's own. Keep imports at the top to the standard library: a heavy one belongs in a
constructor, which runs once a process and outside the limit of a call. An `answer` that a rule cannot read raises: the
data is wrong then, not the response.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from types import FrameType
from typing import Any, Literal

from rlhf.rewards.code_tests import CodeTests, last_code_block
from rlhf.rewards.shaping import CosineLength, length_penalty, overlong, repetition_penalty, target_length

# A minus sign belongs to the number unless it stands behind a digit, a letter or a closing bracket ("10-3" ends in 3).
# A comma is a thousands separator only before groups of three digits ("1,234"), so that "11,19,23" ends in 23.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
# Where a response says which choice it takes: \boxed{C}, <answer>(C)</answer>, "the answer is **C**", "Answer: C". A
# small letter needs something to close it, since "a" is a word. Counts are bounded: a response may be all white space.
_CHOICE = re.compile(
    r"(?i:\\boxed\{\s{0,3}(?:\\text\{)?|<answer>|\banswer(?:\s{1,3}is)?[\s:*]{0,9}(?:option\s{1,3})?)[\s*(\[]{0,9}"
    r"([A-Z](?![\w'])|[a-z](?=\s{0,3}[*)\]}<]))"
)
_LONE_CHOICE = re.compile(r"[\s*(\[]*([A-Za-z])[\s*)\].:]*")


def exact_match(prompt: str, response: str, answer: object) -> float:
    """The response is the answer, white space at both ends apart."""
    return float(response.strip() == str(answer).strip())


def contains(prompt: str, response: str, answer: object) -> float:
    """The answer stands somewhere in the response."""
    text = str(answer).strip()
    if not text:
        raise ValueError("the answer is empty: every response contains it")
    return float(text in response)


def last_number(prompt: str, response: str, answer: object) -> float:
    """The last number in the response equals the last one in the answer ("#### 1,234" and "1234.0" are equal)."""
    expected = _last_number(str(answer))
    if expected is None:
        raise ValueError(f"there is no number in the answer {answer!r}")
    found = _last_number(response)
    return float(found is not None and Decimal(found) == Decimal(expected))


def multiple_choice(prompt: str, response: str, answer: object) -> float:
    """The choice that the response settles on is the letter of the answer: "C", "(C)" and "c." are one.

    The last of \\boxed{C}, <answer>C</answer> and "answer is C" counts, or a response that is nothing but a letter. A
    letter that stands in a sentence does not: "A" is a word too.
    """
    expected = _LONE_CHOICE.fullmatch(str(answer))
    if expected is None:
        raise ValueError(f"the answer {answer!r} is not the letter of a choice")
    lone = _LONE_CHOICE.fullmatch(response)
    found = [lone[1]] if lone else _CHOICE.findall(response)
    return float(bool(found) and found[-1].upper() == expected[1].upper())


def regex_match(prompt: str, response: str, pattern: str, answer: object) -> float:
    """What the pattern's first group, or else the whole pattern, captures in its last match equals the answer."""
    found = [match[match.re.groups and 1] for match in re.finditer(pattern, response, re.DOTALL)]
    return float(bool(found) and found[-1] is not None and found[-1].strip() == str(answer).strip())


class JsonSchema:
    """The response is JSON that a schema allows: its last fenced block, or else all of it.

    The schema is the argument, or else the column `schema`: an object or its JSON. A reference to another document is
    never fetched.
    """

    def __init__(self, schema: Mapping[str, Any] | None = None) -> None:
        import jsonschema
        import referencing

        self._library, self._registry = jsonschema, referencing.Registry()
        self._fixed = None if schema is None else self._validator(schema)

    def __call__(self, prompt: str, response: str, schema: object = None) -> float:
        if self._fixed is None and schema is None:
            raise ValueError("there is no schema: give args.schema, or a column `schema`")
        validator = self._fixed or self._validator(json.loads(schema) if isinstance(schema, str) else schema)
        block = last_code_block(response)
        try:
            return float(validator.is_valid(json.loads(response if block is None else block)))
        except (json.JSONDecodeError, RecursionError):
            return 0.0

    def _validator(self, schema: Any) -> Any:
        kind = self._library.validators.validator_for(schema)
        kind.check_schema(schema)
        return kind(schema, registry=self._registry)


class FormatRegex:
    """The whole response matches a pattern (`re.fullmatch`; a dot matches line ends too)."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, prompt: str, response: str) -> float:
        return float(self._pattern.fullmatch(response) is not None)


class MathAnswer:
    """The response's final answer equals the `answer` as a mathematical expression (math-verify).

    A response that takes more than `limit_s` to check counts as wrong: a model may well write 9^(9^(9^9)). One that
    hangs below Python, where no limit reaches, is ended by the pool and is an error.
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        import math_verify

        if limit_s <= 0:
            raise ValueError(f"limit_s must be positive, got {limit_s}")
        self._library = math_verify
        self._limit_s = limit_s
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off: ours is on

    def __call__(self, prompt: str, response: str, answer: object) -> float:
        gold = self._parse(str(answer)) or self._parse(f"${answer}$")
        if not gold:
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}")
        try:
            with _limit(self._limit_s):
                return float(self._library.verify(gold, self._parse(response), timeout_seconds=None))
        except _TooSlow:
            return 0.0

    def _parse(self, text: str) -> list[Any]:
        found: list[Any] = self._library.parse(text, parsing_timeout=None)
        return found


class ReasoningGym:
    """The score that a reasoning-gym task gives to the answer in the response.

    Reads the columns of the task's entry: `answer`, `metadata` (whose `source_dataset` names the task) and, where the
    data has it, `question`; else the prompt stands for the question. A response without an answer to extract gets 0, as
    does one on which the task's scorer raises, unless it raises on the right answer too: then the entry is wrong. A
    task that gives full marks to nonsense is refused; one that gives them to "nan" does not get to see it.
    """

    def __init__(self, extract: Literal["last_number", "answer_tag", "whole"] = "last_number") -> None:
        import reasoning_gym

        if extract not in EXTRACTORS:
            raise ValueError(f"extract is {extract!r}; it must be one of {', '.join(EXTRACTORS)}")
        self._library = reasoning_gym
        self._extract = EXTRACTORS[extract]
        self._tasks: dict[str, tuple[Callable[..., float], bool]] = {}

    def __call__(
        self, prompt: str, response: str, answer: str, metadata: Mapping[str, Any], question: str | None = None
    ) -> float:
        entry = {"question": prompt if question is None else question, "answer": answer, "metadata": metadata}
        task = metadata["source_dataset"]
        if task not in self._tasks:
            self._tasks[task] = self._examined(task, entry)
        score, believes_nan = self._tasks[task]
        extracted = self._extract(response)
        if extracted is None or (believes_nan and "nan" in extracted.lower()):
            return 0.0
        return _score(score, extracted, entry)

    def _examined(self, task: str, entry: Mapping[str, Any]) -> tuple[Callable[..., float], bool]:
        """The task's scorer, and whether it takes "nan" for the right answer."""
        score = self._library.get_score_answer_fn(task)
        if _score(score, "\N{REPLACEMENT CHARACTER}", entry) >= 1.0:
            raise ValueError(
                f"the scorer of reasoning-gym's task {task} gives full marks to nonsense: leave the task out"
            )
        return score, _score(score, "nan", entry) >= 1.0


def _score(score: Callable[..., float], extracted: str, entry: Mapping[str, Any]) -> float:
    try:
        return float(score(extracted, entry))
    except Exception:  # noqa: BLE001  each task has its own; what the right answer raises too goes up from here
        score(entry["answer"], entry)
        return 0.0


BUILT_INS: dict[str, Callable[..., Any]] = {
    "code_tests": CodeTests,
    "contains": contains,
    "cosine_length": CosineLength,
    "exact_match": exact_match,
    "format_regex": FormatRegex,
    "json_schema": JsonSchema,
    "last_number": last_number,
    "length_penalty": length_penalty,
    "math_answer": MathAnswer,
    "multiple_choice": multiple_choice,
    "overlong": overlong,
    "reasoning_gym": ReasoningGym,
    "regex_match": regex_match,
    "repetition_penalty": repetition_penalty,
    "target_length": target_length,
}


def own_limit_s(function: str, args: Mapping[str, Any]) -> float | None:
    """Seconds after which a built-in calls a response wrong by itself; None: it has no such limit."""
    if function not in BUILT_INS:
        return None
    parameter = inspect.signature(BUILT_INS[function]).parameters.get("limit_s")
    limit = args.get("limit_s", parameter.default) if parameter is not None else None
    return float(limit) if isinstance(limit, int | float) else None


def _last_number(text: str) -> str | None:
    """In plain notation: no thousands separators."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found else None


def _last_tagged(text: str) -> str | None:
    found = _ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "last_number": _last_number,
    "answer_tag": _last_tagged,
    "whole": str.strip,
}


class _TooSlow(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """_TooSlow after so many seconds of Python. A reward process calls rewards in its main thread, as signals need."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
