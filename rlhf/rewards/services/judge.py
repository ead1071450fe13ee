"""Use a language model as the judge of responses: build a request, and read the answer.

Pure functions without network access. A judge's answer is model output about model output. A fixed rule reads the
answer, and an unreadable answer is a failure, never a low score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PATH = "/chat/completions"
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_GIVEN = ("", "prompt", "response")  # not columns


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec:
    """The request to a judge, and the rule for the answer."""

    model: str
    prompt: str  # template with {prompt}, {response} and {column}
    system: str | None
    pattern: str  # the first group of the last match is a number on the scale
    scale: tuple[float, float]  # mapped to 0 to 1
    choices: Mapping[str, float]  # replaces pattern and scale if not empty
    request: Mapping[str, Any]  # further fields of the body

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the row used in the question."""
        return tuple(name for name in dict.fromkeys(_FIELD.findall(self.prompt)) if name not in _GIVEN)


def question(spec: JudgeSpec, prompt: str, response: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the request about a response."""
    values = {**columns, "prompt": prompt, "response": response}

    def fill(match: re.Match[str]) -> str:
        if not match[1]:
            return match[0][0]
        value = values[match[1]]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    system = [] if spec.system is None else [{"role": "system", "content": spec.system}]
    messages = [*system, {"role": "user", "content": _FIELD.sub(fill, spec.prompt)}]
    return {**spec.request, "model": spec.model, "messages": messages}


def verdict(spec: JudgeSpec, answer: Mapping[str, Any]) -> float:
    """Return the score: the completion's number scaled to 0 to 1, or its word's value. ValueError: neither."""
    match answer:
        case {"choices": [{"message": {"content": str(text)}, **rest}, *_]}:
            truncation = ", truncated at its limit of tokens," if rest.get("finish_reason") == "length" else ""
        case _:
            raise ValueError(f"the judge's answer has no choices[0].message.content: {_short(json.dumps(answer))}")
    if spec.choices:
        word = _last_choice(text, tuple(spec.choices))
        if word is None:
            raise ValueError(
                f"the judge's answer{truncation} contains none of the choices {', '.join(spec.choices)}: {_short(text)}"
            )
        return spec.choices[word]
    matches = [match[1] for match in re.finditer(spec.pattern, text) if match[1]]
    if not matches:
        raise ValueError(f"the judge's answer{truncation} has no match of `pattern`: {_short(text)}")
    low, high = spec.scale
    try:
        number = float(matches[-1])
    except ValueError:
        shown = _short(matches[-1])
        raise ValueError(f"`pattern` matches {shown} in the judge's answer, which is not a number") from None
    if not low <= number <= high:  # also refuses nan
        raise ValueError(f"the judge's answer gives {matches[-1]}, which is not on the scale from {low:g} to {high:g}")
    return (number - low) / (high - low)


def _last_choice(text: str, words: Sequence[str]) -> str | None:
    """Return the last choice in the text as a whole word, the longest if several end at the same place."""
    matches = ((word, match) for word in words for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text))
    return max(((match.end(), len(word), word) for word, match in matches), default=(0, 0, None))[2]


def _short(text: str) -> str:
    shown = repr(" ".join(text.split()))
    return shown if len(shown) <= 200 else f"{shown[:80]} ... {shown[-100:]}"
