"""A judge gets a question, and the answer becomes a score."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.schema.rewards import JudgeConfig
from rlhf.rewards.services.judge import JudgeSpec, question, verdict


def judge(**given: Any) -> JudgeSpec:
    return JudgeSpec(**dict(JudgeConfig(model="m", **given)))


def says(text: str | None, **rest: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, **rest}]}


def test_the_question() -> None:
    spec = judge(prompt='{{"q": {prompt}}} {response} {answer} {meta}', system="Be fair.", request={"seed": 3})
    assert spec.columns == ("answer", "meta")
    assert question(spec, "p {response}", "r", {"answer": "a", "meta": {"k": "ü"}, "other": 1}) == {
        "model": "m",
        "seed": 3,
        "messages": [
            {"role": "system", "content": "Be fair."},
            {"role": "user", "content": '{"q": p {response}} r a {"k": "ü"}'},  # filled in once
        ],
    }
    spec = judge()  # the standard question needs no column
    assert spec.columns == ()
    body = question(spec, "P", "R", {})
    assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
    assert verdict(spec, says("It is fine, score: 3 at first. Score: 5.5")) == 0.5  # (5.5 - 1) / 9


def test_the_last_number_on_the_scale() -> None:
    worth = {"Score: 10": 1.0, "score 1": 0.0, "**Score:** 4": 1 / 3, "Score: 2\nScore: 7": 2 / 3}
    assert {text: verdict(judge(), says(text)) for text in worth} == pytest.approx(worth)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says("good"), "no match of `pattern`: 'good'"),
        (says("Score: 11"), "gives 11, which is not on the scale from 1 to 10"),
        (says("Score: -3"), "gives -3"),
        (says("Let me think", finish_reason="length"), "truncated at its limit of tokens"),
        ({}, r"no choices\[0\].message.content"),
        ({"choices": []}, r"no choices\[0\].message.content"),
        (says(None), r"no choices\[0\].message.content"),
        ({"choices": [{"text": "Score: 3"}]}, r"no choices\[0\].message.content"),
    ],
)
def test_an_answer_off_the_scale_or_of_no_completion_is_no_low_score(answer: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        verdict(judge(), answer)


def test_choices_stand_alone_and_the_last_counts() -> None:
    spec = judge(choices={"YES": 1.0, "NO": 0.0, "NOT SURE": 0.25})
    assert verdict(spec, says("NO... no, YES")) == 1.0
    assert verdict(spec, says("I say NOT SURE")) == 0.25
    with pytest.raises(ValueError, match="contains none of the choices YES, NO, NOT SURE: 'NOBODY KNOWS'"):
        verdict(spec, says("NOBODY KNOWS"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prompt": "no place"}, "must hold {response}"),
        ({"prompt": "{response.__class__}"}, "braces hold the name of a column"),
        ({"prompt": "{response} {"}, "Single"),
        ({"pattern": "score"}, "no group"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"scale": (3.0, 3.0)}, "must rise"),
        ({"request": {"messages": []}}, "may not have messages"),
    ],
)
def test_bad_settings(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        judge(**given)
