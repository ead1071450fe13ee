"""Extract the answer of a response for majority votes: equal answers are equal strings."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, get_args

from rlhf.rewards.functions.matching import EXTRACTORS

AnswerForm = Literal["last_number", "answer_tag", "boxed", "whole"]
ANSWER_FORMS: tuple[AnswerForm, ...] = get_args(AnswerForm)

_FORM_OF_REWARD: dict[str, AnswerForm] = {"exact_match": "whole", "last_number": "last_number", "math_answer": "boxed"}


def answer_of(response: str, form: AnswerForm) -> str | None:
    """Return the response's answer, or None without an answer.

    last_number: the last number, `1,234.0` as `1234`. answer_tag: the content of the last <answer>...</answer>. boxed:
    the content of the last \\boxed{...}. whole: the whole response without surrounding white space.
    """
    answer = _last_boxed(response) if form == "boxed" else EXTRACTORS[form](response)
    if answer is None or form != "last_number":
        return answer or None
    text = format(Decimal(answer), "f")  # exact for any number of digits; the extractor has expanded exponents
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def answer_form(function: str, args: Mapping[str, Any]) -> AnswerForm | None:
    """Return the form of the answers scored by a built-in reward, or None if the reward compares no answers."""
    if function == "reasoning_gym":
        form: AnswerForm = args.get("extract", "last_number")
        return form
    return _FORM_OF_REWARD.get(function)


def _last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed braces, or None for missing or unclosed braces."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for index, character in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:index].strip()
    return None
