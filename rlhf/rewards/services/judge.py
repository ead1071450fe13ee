"""Use a language model as the judge of responses: build the requests, and read the answers.

Pure functions without network access. A judge's answer is model output about model output. A fixed rule reads the
answer, and an unreadable answer is a failure, never a low score.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.rewards.functions.matching import final_choice
from rlhf.rewards.services.images import IMAGES, data_uri

PATH = "/chat/completions"
AGREEMENT = "agreement"  # name of a measured value: the agreement of repeated judgements
CRITERION = "criterion/"  # begins the names of measured criteria
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_MAX_READ_CHARS = 65_536  # characters at the end of an answer in which an object is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A criterion of a rubric."""

    text: str | None  # template with {column}; None: a function decides, and not the judge
    weight: float = 1.0
    scale: tuple[int, int] = (0, 1)  # whole numbers, mapped to 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec:
    """The requests to a judge, and the rule for the answers."""

    model: str
    prompt: str  # template with {prompt}, {question}, {response}, {criteria} and {column}
    system: str | None
    pattern: str  # the first group of the last match is a number on the scale
    scale: tuple[float, float]  # mapped to 0 to 1
    choices: Mapping[str, float]  # replaces pattern and scale if not empty
    request: Mapping[str, Any]  # further fields of the body
    rubric: Mapping[str, Criterion] | str | None = None  # criteria by name, or the column with the criteria of a row
    compare: Literal["win_rate", "bradley_terry"] | None = None  # compare two responses; the summary of comparisons
    opponents: int | str | None = None  # other responses of the group (None: all), or the column with one opponent
    samples: int = 1  # judgements of each question

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the row used in the question."""
        responses = ("response",) if self.compare is None else ("response_a", "response_b")
        filled = ("prompt", "question", "criteria", *responses)
        names = [name for name in _FIELD.findall(self.prompt) if name not in filled]
        for item in self.rubric.values() if isinstance(self.rubric, Mapping) else ():
            names += _FIELD.findall(item.text or "")
        names += [name for name in (self.rubric, self.opponents) if isinstance(name, str)]
        return tuple(dict.fromkeys(filter(None, names)))  # "" stands for a literal brace

    def criteria(self, columns: Mapping[str, Any]) -> Mapping[str, Criterion]:
        """Return the criteria for a row, empty without a rubric. ValueError: the column holds no rubric."""
        if isinstance(self.rubric, str):
            return read_rubric(columns[self.rubric])
        return self.rubric or {}


def question(spec: JudgeSpec, values: Mapping[str, Any], *, repeat: int = 0) -> dict[str, Any]:
    """Return the body of a request. `values` has the columns of the row and prompt, question and response.

    The criteria of a rubric are listed, and the JSON schema of the answer is requested. `repeat` numbers the judgements
    of the same question, and is added to the seed of the request.
    """
    judged = {name: item for name, item in spec.criteria(values).items() if item.text is not None}
    is_literal = isinstance(spec.rubric, str)
    lines = [
        f"- {name} ({item.scale[0]} to {item.scale[1]}): {item.text if is_literal else _fill(item.text or '', values)}"
        for name, item in judged.items()
    ]
    filling = {**values, "criteria": "\n".join(lines)}
    content = _with_images(spec.prompt, filling)
    system = [] if spec.system is None else [{"role": "system", "content": spec.system}]
    body = {**spec.request, "model": spec.model, "messages": [*system, {"role": "user", "content": content}]}
    if repeat and isinstance(body.get("seed"), int):
        body["seed"] += repeat
    return ({"response_format": _format(judged)} if judged else {}) | body


def _with_images(template: str, values: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """Return the content of a request: a text, or with the row's images in place of `{images}` OpenAI's parts.

    RunError: the file of an image is gone.
    """
    places = [match.span() for match in _FIELD.finditer(template) if match[1] == IMAGES]
    if not places:
        return _fill(template, values)
    parts: list[dict[str, Any]] = []
    for start, end in itertools.pairwise([(0, 0), *places, (len(template), len(template))]):
        if filled := _fill(template[start[1] : end[0]], values):
            parts.append({"type": "text", "text": filled})
        if end in places:
            parts += [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in values[IMAGES]]
    return parts


def verdict(spec: JudgeSpec, columns: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """Return the value of each criterion from 0 to 1. Without a rubric the only name is "", for the score.

    The score is the completion's number scaled to 0 to 1, or its word's value. With `compare` the score is 1 if the
    first response is better, and 0 if the second is. ValueError: the answer is unreadable, or off a scale.
    """
    match answer:
        case {"choices": [{"message": {"content": str(text)}, **rest}, *_]}:
            truncation = ", truncated at its limit of tokens," if rest.get("finish_reason") == "length" else ""
        case _:
            raise ValueError(f"the judge's answer has no choices[0].message.content: {_short(json.dumps(answer))}")
    if spec.rubric is not None:
        return _criteria_scores(spec.criteria(columns), text, truncation)
    if spec.compare is not None:
        letter = final_choice(text)
        if letter not in ("A", "B"):
            raise ValueError(
                f"the judge's answer{truncation} ends in neither `Answer: A` nor `Answer: B`: {_short(text)}"
            )
        return {"": float(letter == "A")}
    return {"": _single_score(spec, text, truncation)}


def _single_score(spec: JudgeSpec, text: str, truncation: str) -> float:
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


def _criteria_scores(criteria: Mapping[str, Criterion], text: str, truncation: str) -> dict[str, float]:
    numbers = _last_scores(text[-_MAX_READ_CHARS:])
    if numbers is None:
        raise ValueError(f"the judge's answer{truncation} has no JSON object with `scores`: {_short(text)}")
    scores: dict[str, float] = {}
    for name, criterion in criteria.items():
        if criterion.text is None:
            continue
        (low, high), number = criterion.scale, numbers.get(name)
        if name not in numbers:
            raise ValueError(f"the judge's answer has no score of the criterion `{name}`: {_short(text)}")
        if isinstance(number, bool):  # some judges write true for 1
            number = int(number)
        if not isinstance(number, int | float) or not low <= number <= high:  # also refuses nan
            shown = _short(json.dumps(number))
            raise ValueError(f"the judge's answer gives {shown} for `{name}`, which is not from {low} to {high}")
        scores[name] = (number - low) / (high - low)
    return scores


def _last_scores(text: str) -> Mapping[str, Any] | None:
    """Return `scores` of the last JSON object in a text with an object of this name."""
    decoder, place, last = json.JSONDecoder(), text.find("{"), None
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError:
            value, end = None, place + 1
        if isinstance(value, Mapping) and isinstance(value.get("scores"), Mapping):
            last = value["scores"]
        place = text.find("{", end)
    return last


def weighted_score(criteria: Mapping[str, Criterion], values: Mapping[str, float | None]) -> float | None:
    """Return the sum of weight * value over the criteria, divided by the sum of the weights above 0.

    With weights above 0 the score is the weighted mean of arXiv:2507.17746, eq. 1. A criterion with a weight below 0
    describes a mistake, and the score is that of HealthBench (arXiv:2505.08775), not clipped at 0. A criterion without
    an opinion (None) is left out of both sums. None: no opinion has a weight above 0.
    """
    known = [(criteria[name].weight, value) for name, value in values.items() if value is not None]
    most = sum(weight for weight, _ in known if weight > 0.0)
    return sum(weight * value for weight, value in known) / most if most > 0.0 else None


def agreement(values: Sequence[float]) -> float:
    """Return the agreement of judgements from 0 to 1: 1 minus the mean distance of two judgements.

    For judgements of 0 and 1 this is the share of agreeing pairs: Fleiss (1971), Measuring nominal scale agreement
    among many raters. Between 0 and 1, the weights are linear (Cohen 1968). Agreement by chance is not removed.
    """
    if len(values) < 2:
        raise ValueError("agreement needs two judgements or more")
    pairs = [abs(a - b) for place, a in enumerate(values) for b in values[:place]]
    return 1.0 - sum(pairs) / len(pairs)


def read_rubric(value: object) -> dict[str, Criterion]:
    """Return the criteria in a row's column: a list of objects with `criterion` and `weight`, or its JSON text.

    `description` (Rubrics as Rewards) and `points` (HealthBench) are the same keys, and further keys are ignored. The
    name of a criterion is its number in the list. ValueError describes what is wrong.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is a text that is not the JSON of a list: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"is {_short(json.dumps(value, default=str))}, expected a list with one criterion or more")
    criteria: dict[str, Criterion] = {}
    for number, item in enumerate(value, start=1):
        fields = item if isinstance(item, Mapping) else {}
        text = fields.get("criterion", fields.get("description"))
        weight = fields.get("weight", fields.get("points", 1.0))
        if not isinstance(text, str) or not text.strip():
            shown = _short(json.dumps(item, default=str))
            raise ValueError(f"has {shown} as criterion {number}, expected an object with the text `criterion`")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"has the weight {weight!r:.40} in criterion {number}, expected a finite number")
        criteria[str(number)] = Criterion(text=text, weight=float(weight))
    if not any(criterion.weight > 0.0 for criterion in criteria.values()):
        raise ValueError("has no criterion with a weight above 0, so there is no best score; give one such a weight")
    return criteria


def _format(criteria: Mapping[str, Criterion]) -> dict[str, Any]:
    """Return the JSON schema of the answer in OpenAI's form. The reasons come first, so that the scores follow them."""
    scales = {name: list(range(item.scale[0], item.scale[1] + 1)) for name, item in criteria.items()}
    numbers = {name: {"type": "integer", "enum": values} for name, values in scales.items()}
    scores = {"type": "object", "properties": numbers, "required": [*numbers], "additionalProperties": False}
    properties = {"reasons": {"type": "string"}, "scores": scores}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": schema}}


def _fill(template: str, values: Mapping[str, Any]) -> str:
    def fill(match: re.Match[str]) -> str:
        if not match[1]:
            return match[0][0]
        value = values[match[1]]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _FIELD.sub(fill, template)


def _last_choice(text: str, words: Sequence[str]) -> str | None:
    """Return the last choice in the text as a whole word, the longest if several end at the same place."""
    matches = ((word, match) for word in words for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text))
    return max(((match.end(), len(word), word) for word, match in matches), default=(0, 0, None))[2]


def _short(text: str) -> str:
    shown = repr(" ".join(text.split()))
    return shown if len(shown) <= 200 else f"{shown[:80]} ... {shown[-100:]}"
