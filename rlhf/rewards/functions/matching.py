"""Built-in rewards: rules to compare a response with a column of the data row.

The rules here give 1.0 for right and 0.0 for wrong. `reasoning_gym` gives the partial credit of its task. All run in
reward processes, like a user's reward. Keep imports at the top to the standard library: a heavy import belongs in a
constructor, run once per process and outside the time limit of a call.

Two rules hold for every built-in. An unreadable data row raises, because the data is wrong. A response never raises: an
unreadable response, or a response without a result within `limit_s`, is wrong.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import FrameType
from typing import Any, Literal, NoReturn, TypeVar

from rlhf.rewards.functions.code_tests import code_blocks
from rlhf.rewards.functions.length_shaping import positive

T = TypeVar("T")
# A minus sign belongs to the number unless it follows a digit, a letter or a closing bracket ("10-3" ends in 3).
# A comma is a thousands separator only before groups of three digits ("1,234"), so that "11,19,23" ends in 23.
# A number may begin with its decimal point (".5"), but "v.5" and "1.2.3" end in 5 and 3. An exponent has at most three
# digits, because a number is written out in full.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?!\w))?"
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
# Where a response names the choice: \boxed{C}, <answer>(C)</answer>, "the answer is **C**", "Answer: C". A
# small letter needs something to close it, since "a" is a word. Counts are bounded: a response may be all white space.
_CHOICE = re.compile(
    r"(?i:\\boxed\{\s{0,3}(?:\\text\{)?|<answer>|\banswer(?:\s{1,3}is)?[\s:*]{0,9}(?:option\s{1,3})?)[\s*(\[]{0,9}"
    r"([A-Z](?![\w'])|[a-z](?=\s{0,3}[*)\]}<]))"
)
_LONE_CHOICE = re.compile(r"[\s*(\[]*([A-Za-z])[\s*)\].:]*")
# A command in LaTeX, together with its text ("\text{ cm}") or the name of its environment.
_LATEX_COMMAND = re.compile(r"\\(?:(?:text|math|mbox|operatorname|begin|end)[a-z]*\*?(?:\s*\{[^{}]*\})+|[A-Za-z]+)")
# An answer is more than LaTeX if one of these matches, with each command replaced by @. After a number and a space, two
# letters or a last capital letter are a unit ("5 kg", "5 N"), but "3xy" is a product.
_TEXT = re.compile(
    r"[$#]|(?<!\\)\\[(\[]"  # a delimiter says where LaTeX begins, and #### where the answer begins
    r"|^\(?[A-Z][).:]\s"  # (B) 12
    r"|^(?!(?:and|or)\b)[^\W\d_]{2,}\.?\s+[-+]?[0-9]"  # Rs 500
    r"|^[^A-Za-z]*=[^A-Za-z@]*$"  # 2 + 2 = 4
    r"|[0-9]\s[0-9]{3}(?![0-9])"  # 1 000 000
    r"|(?<![0-9])(?!and\b)[^\W\d_]{3,}"  # a word
    r"|(?<=[0-9]\s)(?:(?!(?:and|or)\b)[^\W\d_]{2,}|[A-Z]$|m[/^23])"  # a unit
)

# Roots and pi as plain text: 5*sqrt(2), 2pi.
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\(([^()]*)\)")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt(?=\s*(?:\[[^\[\]]*\]\s*)?\{)")  # of LaTeX without the backslash
_PLAIN_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")


def exact_match(prompt: str, response: str, answer: object) -> float:
    """Return 1.0 if the response equals the answer, ignoring surrounding white space."""
    return float(response.strip() == str(answer).strip())


def contains(prompt: str, response: str, answer: object) -> float:
    """Return 1.0 if the response contains the answer."""
    text = str(answer).strip()
    if not text:
        raise ValueError("the answer is empty: every response contains it")
    return float(text in response)


def last_number(prompt: str, response: str, answer: object) -> float:
    """Compare the last number in the response with the last in the answer ("#### 1,234" equals "1.234e3")."""
    expected = _last_number(str(answer))
    if expected is None:
        raise ValueError(f"there is no number in the answer {answer!r}")
    actual = _last_number(response)
    return float(actual is not None and Decimal(actual) == Decimal(expected))


def multiple_choice(prompt: str, response: str, answer: object) -> float:
    """Return 1.0 if the response's final choice is the letter of the answer: "C", "(C)" and "c." are equal.

    The last of \\boxed{C}, <answer>C</answer> and "answer is C" counts, or a response of a single letter. A letter
    within a sentence does not count, since "A" is also a word.
    """
    expected = _LONE_CHOICE.fullmatch(str(answer))
    if expected is None:
        raise ValueError(f"the answer {answer!r} is not the letter of a choice")
    return float(final_choice(response) == expected[1].upper())


def final_choice(response: str) -> str | None:
    """Return the letter of the response's final choice, in upper case, or None."""
    lone = _LONE_CHOICE.fullmatch(response)
    choices = [lone[1]] if lone else _CHOICE.findall(response)
    return str(choices[-1]).upper() if choices else None


def regex_match(prompt: str, response: str, pattern: str, answer: object, limit_s: float = 5.0) -> float:
    """Compare the last match of the pattern with the answer: the first group, or the whole match without a group."""
    compiled = re.compile(pattern, re.DOTALL)
    last = _in_time(positive("limit_s", limit_s), lambda: deque(compiled.finditer(response), maxlen=1))
    captured = last[0][compiled.groups and 1] if last else None
    return float(captured is not None and captured.strip() == str(answer).strip())


class JsonSchema:
    """The response is JSON allowed by a schema: the last fenced block, or else the whole response.

    The schema is the argument, or else the column `schema`: an object or JSON text. A reference to another document is
    never fetched. NaN and Infinity are not JSON, and no schema allows a number Python cannot read.
    """

    def __init__(self, schema: Mapping[str, Any] | None = None, limit_s: float = 5.0) -> None:
        import jsonschema
        import referencing

        self._library, self._registry = jsonschema, referencing.Registry()
        self._limit_s = positive("limit_s", limit_s)
        self._fixed = None if schema is None else self._validator(schema)

    def __call__(self, prompt: str, response: str, schema: object = None) -> float:
        if self._fixed is None and schema is None:
            raise ValueError("there is no schema: give args.schema, or a column `schema`")
        validator = self._fixed or self._validator(json.loads(schema) if isinstance(schema, str) else schema)
        blocks = [content for _, content in code_blocks(response)]

        def is_valid() -> bool:
            try:
                value = json.loads(blocks[-1] if blocks else response, parse_constant=_refuse_constant)
                return bool(validator.is_valid(value))
            except (ValueError, OverflowError, RecursionError):  # such as 5,000 digits, or 1e999 and `multipleOf`
                return False

        return float(_in_time(self._limit_s, is_valid) or False)

    def _validator(self, schema: Any) -> Any:
        kind = self._library.validators.validator_for(schema)
        kind.check_schema(schema)
        return kind(schema, registry=self._registry)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class FormatRegex:
    """The whole response matches a pattern (`re.fullmatch`; a dot also matches newlines)."""

    def __init__(self, pattern: str, limit_s: float = 5.0) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        self._limit_s = positive("limit_s", limit_s)

    def __call__(self, prompt: str, response: str) -> float:
        return float(_in_time(self._limit_s, lambda: self._pattern.fullmatch(response)) is not None)


class MathAnswer:
    """The response's final answer equals the `answer` as a mathematical expression (math-verify).

    A response counts as wrong if the check takes more than `limit_s`: a model may write 9^(9^(9^9)).
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        import math_verify

        self._library = math_verify
        self._limit_s = positive("limit_s", limit_s)
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # math-verify would warn about disabled limits

    def __call__(self, prompt: str, response: str, answer: object) -> float:
        gold = self._parse_answer(str(answer).strip())
        if not gold:
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}")
        equal = _in_time(self._limit_s, lambda: self._library.verify(gold, self._parse(response), timeout_seconds=None))
        return float(bool(equal))

    def _parse_answer(self, answer: str) -> list[Any]:
        """Parse an answer as LaTeX, or as text with a number.

        Of LaTeX without delimiters math-verify would only read a number: 5 of "5\\sqrt{2}", and 1 of "x^2 + 1".
        math-verify would also read 5 of "5*sqrt(2)", so roots and pi are written as LaTeX.
        """
        answer = _PLAIN_PI.sub(r"\\pi", _PLAIN_ROOT.sub(r"\\sqrt{\1}", _BARE_ROOT.sub(r"\\sqrt", answer)))
        if not _TEXT.search(_LATEX_COMMAND.sub("@", answer)):
            latex = self._parse(f"${answer}$")
            if len(latex) > 1:  # an expression and its text; the text alone is no expression
                return latex
        return self._parse(answer) or self._parse(f"${answer}$")

    def _parse(self, text: str) -> list[Any]:
        """Parse text, with `sqrt{2}` as a root. math-verify would read four letters and a number."""
        expressions: list[Any] = self._library.parse(_BARE_ROOT.sub(r"\\sqrt", text), parsing_timeout=None)
        return expressions


class ReasoningGym:
    """The score of a reasoning-gym task for the answer in the response.

    The reward reads the columns of the task's entry: `answer`, `metadata` (with the task in `source_dataset`) and
    optionally `question`, by default the prompt. A response scores 0 without an extractable answer, or if the task's
    scorer raises or takes more than `limit_s`. If the scorer raises on the right answer too, the entry is wrong, and
    the error is raised.

    A task with full marks for nonsense is refused. A task with full marks for "nan" never receives "nan".
    """

    def __init__(
        self, extract: Literal["last_number", "answer_tag", "whole"] = "last_number", limit_s: float = 5.0
    ) -> None:
        import reasoning_gym

        if extract not in EXTRACTORS:
            raise ValueError(f"extract is {extract!r}; it must be one of {', '.join(EXTRACTORS)}")
        self._library = reasoning_gym
        self._limit_s = positive("limit_s", limit_s)
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
        value = _in_time(self._limit_s, lambda: _score(score, extracted, entry))
        return value if value is not None and math.isfinite(value) else 0.0

    def _examined(self, task: str, entry: Mapping[str, Any]) -> tuple[Callable[..., float], bool]:
        """Return the task's scorer, and whether the scorer accepts "nan" as the right answer."""
        score = self._library.get_score_answer_fn(task)
        if _score(score, "\N{REPLACEMENT CHARACTER}", entry) >= 1.0:
            raise ValueError(f"reasoning-gym's scorer of {task} gives full marks to nonsense: leave the task out")
        return score, _score(score, "nan", entry) >= 1.0


def _score(score: Callable[..., float], extracted: str, entry: Mapping[str, Any]) -> float:
    try:
        return float(score(extracted, entry))
    except Exception:  # noqa: BLE001  each task has its own; what the right answer raises too goes up from here
        score(entry["answer"], entry)
        return 0.0


def _last_number(text: str) -> str | None:
    """Return the last number in plain notation, without thousands separators or an exponent."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return format(Decimal(numbers[-1].replace(",", "")), "f") if numbers else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "last_number": _last_number,
    "answer_tag": lambda text: next((tagged.strip() for tagged in reversed(_ANSWER_TAG.findall(text))), None),
    "whole": str.strip,
}

_AGAIN_S = 0.5  # a destructor may have swallowed the first _TooSlow


class _TooSlow(BaseException):
    """Ends a check at the limit. The class is no Exception, because sympy and math-verify catch exceptions."""


def _in_time(seconds: float, check: Callable[[], T]) -> T | None:
    """Return the result of a check, or None after a number of seconds. Signals require the main thread.

    This interrupts Python code and regular expressions, but not a C function. For a hanging C function the pool ends
    the process, and the response scores `score_of_killed`.
    """
    done = False

    def stop(number: int, frame: FrameType | None) -> None:
        if not done:
            raise _TooSlow

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        result = check()
        done = True
        return result
    except _TooSlow:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
