"""The answer in a response, by which responses vote: equal answers are equal strings."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, get_args

from rlhf.rewards.functions.matching import EXTRACTORS

AnswerForm = Literal["last_number", "answer_tag", "boxed", "whole"]
ANSWER_FORMS: tuple[AnswerForm, ...] = get_args(AnswerForm)

_OF_REWARD: Mapping[str, AnswerForm] = {"exact_match": "whole", "last_number": "last_number", "math_answer": "boxed"}


def answer_of(response: str, form: AnswerForm) -> str | None:
    """The response's answer; None if it has none.

    last_number: the last number, `1,234.0` as `1234`. answer_tag: what the last <answer>...</answer> holds. boxed: what
    the last \\boxed{...} holds. whole: all of it, white space at both ends apart.
    """
    found = _last_boxed(response) if form == "boxed" else EXTRACTORS[form](response)
    if found is None or form != "last_number":
        return found or None
    text = format(Decimal(found), "f")  # exact, whatever the number of digits; the extractor has expanded exponents
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def answer_form(function: str, args: Mapping[str, Any]) -> AnswerForm | None:
    """How the responses that a built-in reward scores give their answers. None: the reward compares no answers."""
    if function == "reasoning_gym":
        form: AnswerForm = args.get("extract", "last_number")
        return form
    return _OF_REWARD.get(function)


def _last_boxed(text: str) -> str | None:
    """What stands in its braces; None if there is none, or they do not close."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place].strip()
    return None
