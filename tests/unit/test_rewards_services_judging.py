"""Judges with rubrics, repeated judgements, comparisons within a group, and remembered answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlhf.config.schema.rewards import JudgeConfig, RewardConfig
from rlhf.data.row import Row
from rlhf.errors import UserError
from rlhf.preflight.sources import check_rewards, load_rewards
from rlhf.rewards.scoring import RewardSet, RewardSpec
from rlhf.rewards.services.judge import agreement, question, read_rubric
from rlhf.rewards.services.judgements import Judgements, content_key
from rlhf.types import GroupScores, Prompt
from tests.fakes.services import served

RUBRIC = {
    "right": {"criterion": "The answer agrees with {answer}.", "weight": 3},
    "clear": {"criterion": "The answer is clear.", "weight": 1, "scale": [1, 5]},
    "brief": {"function": "length_penalty", "args": {"limit": 4}, "weight": 1},
}


class FakeJudge:
    """A judge whose answer is a function of the question's text. It counts the questions."""

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self.answer, self.questions = answer, list[str]()
        self.bodies = list[dict[str, Any]]()

    async def __call__(self, request: web.Request) -> web.Response:
        if not request.can_read_body:
            return web.json_response({})
        body = await request.json()
        text = body["messages"][-1]["content"]
        answer = self.answer(text, self.questions.count(text))
        self.questions.append(text)
        self.bodies.append(body)
        content = answer if isinstance(answer, str) else json.dumps(answer)
        return web.json_response({"choices": [{"message": {"content": content}}]})


def specs_of(url: str, judge: Mapping[str, Any], **settings: Any) -> tuple[RewardSpec, ...]:
    reward = RewardConfig.model_validate({"url": url, "judge": {"model": "m", **judge}, **settings})
    return load_rewards({"quality": reward}, beside=Path.cwd(), memory_gib=8.0)


@contextmanager
def rewards_of(
    judge: FakeJudge, settings: Mapping[str, Any], folder: Path | None = None, worker: int = 0, **reward: Any
) -> Iterator[Callable[..., GroupScores]]:
    """Yield a function that scores responses to a prompt by a judge of this process."""
    with served(judge) as url:
        # the same address as in another start, so that the answers are known by content
        specs = specs_of(url, settings, **reward)
        with closing(RewardSet(specs, timeout_s=10.0, judgements=folder, worker=worker)) as rewards:

            def score(responses: Sequence[str], columns: Mapping[str, Any] | None = None) -> GroupScores:
                row = {"answer": "4", **(columns or {})}
                prompt = Prompt(prompt_id=3, token_ids=(1,), text="<s>2+2", question="2+2", columns=row)
                cut = [False] * len(responses)
                return rewards.score(
                    prompt, responses, truncated=cut, asked=rewards.ask(prompt, responses, truncated=cut)
                )

            yield score


def scores(**values: Any) -> dict[str, Any]:
    return {"reasons": "because", "scores": values}


def test_a_rubric_is_one_request_and_every_criterion_has_a_value() -> None:
    judge = FakeJudge(lambda text, _: scores(right=int("Response:\n4" in text), clear=3))
    with rewards_of(judge, {"rubric": RUBRIC}) as score:
        found = score(["4", "five five"])
    assert len(judge.questions) == 2
    assert "- right (0 to 1): The answer agrees with 4.\n- clear (1 to 5): The answer is clear." in judge.questions[0]
    assert "2+2" in judge.questions[0]
    assert "<s>" not in judge.questions[0]
    assert "brief" not in judge.questions[0]
    schema = judge.bodies[0]["response_format"]["json_schema"]["schema"]
    wanted = schema["properties"]["scores"]
    assert wanted["required"] == ["right", "clear"]
    assert wanted["properties"]["clear"]["enum"] == [1, 2, 3, 4, 5]
    assert {name: dict(enumerate(values)) for name, values in found.parts.items()} == {
        "quality/criterion/right": {0: 1.0, 1: 0.0},
        "quality/criterion/clear": {0: 0.5, 1: 0.5},  # (3 - 1) / (5 - 1)
        "quality/criterion/brief": {0: -0.25, 1: -0.5},  # words / limit
    }
    # (3 * 1 + 1 * 0.5 - 1 * 0.25) / 5 and (3 * 0 + 1 * 0.5 - 1 * 0.5) / 5
    assert found.scores == pytest.approx((0.65, 0.0))


def test_criteria_of_a_row_in_the_forms_of_public_data_sets() -> None:
    rubric = [
        {"criterion": "names a dose", "points": 6, "tags": ["axis:accuracy"]},  # HealthBench
        {"title": "Pitfall", "description": "invents a source", "weight": -2},  # Rubrics as Rewards
        {"criterion": "is polite", "weight": 2, "name": "polite"},  # further keys are ignored
    ]
    judge = FakeJudge(lambda text, _: scores(**{"1": 1, "2": 1, "3": 0}))
    with rewards_of(judge, {"rubric": "rubric"}) as score:
        found = score(["a"], {"rubric": rubric})
        assert score(["b"], {"rubric": json.dumps(rubric)}).scores == found.scores
    assert found.scores == pytest.approx(((6 - 2) / (6 + 2),))
    assert found.parts == {
        "quality/criterion/1": (1.0,),
        "quality/criterion/2": (1.0,),
        "quality/criterion/3": (0.0,),
    }


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (scores(right=1), "has no score of the criterion `clear`"),
        (scores(right=2, clear=3), "gives '2' for `right`, which is not from 0 to 1"),
        (scores(right=1, clear="3"), "which is not from 1 to 5"),
        (scores(right=1, clear=None), "which is not from 1 to 5"),
        ('{"scores": {"right": 1, "clear": NaN}}', "which is not from 1 to 5"),
        ({"right": 1, "clear": 3}, "no JSON object with `scores`"),
        ('{"scores": {"right": 1, "cl', "no JSON object with `scores`"),
        ("right: 1, clear: 3", "no JSON object with `scores`"),
        ('{"scores": {"right": ' + "[" * 9000, "recursion"),
    ],
)
def test_a_partial_answer_or_one_off_the_scale_is_a_failure_and_no_low_score(answer: Any, why: str) -> None:
    with rewards_of(FakeJudge(lambda *_: answer), {"rubric": RUBRIC}) as score:
        found = score(["4"])
    assert (found.scores, found.by_name) == ((), {})
    (error,) = found.errors
    assert (error.reward, error.kind) == ("quality", "not_a_number")
    assert why in error.message
    with rewards_of(FakeJudge(lambda *_: answer), {"rubric": RUBRIC}, on_error=-1.0) as score:
        found = score(["4"])
    assert found.scores == (-1.0,)
    assert len(found.scored_errors) == 1


def test_the_last_object_counts_whatever_is_around_it() -> None:
    text = 'I think {"scores": {"right": 0, "clear": 1}}.\n```json\n{"scores": {"clear": 5.0, "right": true}}\n```{'
    with rewards_of(FakeJudge(lambda *_: text), {"rubric": RUBRIC}) as score:
        assert score(["4"]).parts["quality/criterion/right"] == (1.0,)


def test_a_criterion_of_a_function_that_fails_is_a_failure_of_the_reward(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def bad(prompt, response):\n    return float(response)\n")
    rubric = {"right": RUBRIC["right"], "number": {"function": f"{tmp_path}/bad.py:bad"}}
    with rewards_of(FakeJudge(lambda *_: scores(right=1)), {"rubric": rubric}) as score:
        assert score(["4"]).scores == (1.75,)  # (3 * 1 + 1 * 4) / 4
        found = score(["4", "four"])
    assert [(e.sample, e.kind, e.message[:20]) for e in found.errors] == [(1, "raised", "criterion `number`: ")]


def test_repeated_judgements_have_a_mean_and_an_agreement() -> None:
    judge = FakeJudge(lambda text, repeat: scores(right=int(repeat < 2), clear=5))
    settings = {"rubric": RUBRIC, "samples": 3, "request": {"temperature": 1.0, "seed": 7}}
    with rewards_of(judge, settings) as score:
        found = score(["4"])
    assert [body["seed"] for body in judge.bodies] == [7, 8, 9]
    assert found.parts["quality/criterion/right"] == pytest.approx((2 / 3,))
    # right: 1, 1, 0 agree in 1 of 3 pairs; clear: all agree. The mean is (1/3 + 1) / 2.
    assert found.parts["quality/agreement"] == pytest.approx((2 / 3,))
    assert agreement([0.0, 0.25, 1.0]) == pytest.approx(1 - (0.25 + 0.75 + 1.0) / 3)
    single = FakeJudge(lambda text, repeat: f"Score: {1 + 9 * repeat}")
    with rewards_of(single, {"samples": 2, "request": {"max_tokens": 8}}) as score:
        found = score(["4"])
    assert (found.scores, found.parts) == ((0.5,), {"quality/agreement": (0.0,)})


def test_nothing_is_asked_twice_even_by_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of the service changes in this test, and is left out of the key."""
    path = "rlhf.rewards.services.judging.content_key"
    monkeypatch.setattr(path, lambda url, *rest: content_key("", *rest))
    answers = lambda *_: scores(right=1, clear=5)  # noqa: E731
    first, second, third = FakeJudge(answers), FakeJudge(answers), FakeJudge(answers)
    with rewards_of(first, {"rubric": RUBRIC}, tmp_path, worker=1) as score:
        one = score(["4", "4", "5"])
        assert score(["5", "4"]).scores == (one.scores[2], one.scores[0])
    assert len(first.questions) == 2
    with rewards_of(second, {"rubric": RUBRIC}, tmp_path) as score:
        assert score(["4", "4", "5"]) == one
        score(["6"])
    assert len(second.questions) == 1
    heavier = {**RUBRIC, "right": {**RUBRIC["right"], "weight": 9}}  # the judge does not see weights
    with rewards_of(third, {"rubric": heavier}, tmp_path) as score:
        score(["6"])
        assert not third.questions
    other = {**RUBRIC, "clear": {**RUBRIC["clear"], "scale": [0, 9]}}
    with rewards_of(third, {"rubric": other}, tmp_path) as score:
        score(["6"])
    assert len(third.questions) == 1


def test_an_answer_is_read_anew_by_another_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of a single score is not part of the question."""
    monkeypatch.setattr("rlhf.rewards.services.judging.content_key", lambda url, *rest: content_key("", *rest))
    judge = FakeJudge(lambda *_: "Score: 5")
    for settings, wanted in (({}, 4 / 9), ({"scale": [0, 10]}, 0.5), ({"pattern": "(5)"}, 4 / 9)):
        with rewards_of(judge, settings, tmp_path) as score:
            assert score(["4"]).scores == pytest.approx((wanted,))
    assert len(judge.questions) == 3


def test_failures_are_not_remembered() -> None:
    judge = FakeJudge(lambda text, repeat: "Score: 10" if repeat else "no")
    with rewards_of(judge, {}) as score:
        assert score(["4"]).errors
        assert score(["4"]).scores == (1.0,)


def test_the_memory_is_bounded_in_the_worker_and_on_the_disk(tmp_path: Path) -> None:
    known = Judgements(tmp_path, most=3)
    for number in range(10):
        known.put(f"k{number}", {"": float(number)})
    assert [known.get(f"k{number}") is None for number in range(10)] == [True] * 7 + [False] * 3
    path = tmp_path / "worker_0.jsonl"
    assert len(path.read_text().splitlines()) < 6
    with path.open("a") as file:
        file.write('{"key": "half')  # a killed write
    again = Judgements(tmp_path, most=3)
    assert again.get("k9") == {"": 9.0}
    again.put("new", {"": 1.0})
    assert Judgements(tmp_path, most=3).get("new") == {"": 1.0}


def prefers(better: Callable[[str, str], bool]) -> Callable[[str, int], str]:
    """Return a judge that names the better of the two responses in the default question."""

    def answer(text: str, repeat: int) -> str:
        _, _, rest = text.partition("Response A:\n")
        a, _, rest = rest.partition("\n\nResponse B:\n")
        return "Answer: A" if better(a, rest.partition("\n\n")[0]) else "Answer: B"

    return answer


def longer(a: str, b: str) -> bool:
    return len(a) > len(b)


def test_responses_of_a_group_are_compared_with_each_other() -> None:
    judge = FakeJudge(prefers(longer))
    with rewards_of(judge, {"compare": "win_rate"}) as score:
        assert score(["a", "aaa", "aa", "aaaa"]).scores == pytest.approx((0, 2 / 3, 1 / 3, 1))
        assert len(judge.questions) == 6
        assert score(["a", "a", "aa"]).scores == pytest.approx((0.25, 0.25, 1.0))  # equal responses share their game
        assert score(["aa"]).errors[0].kind == "no_opinion"
    bounded = FakeJudge(prefers(longer))
    with rewards_of(bounded, {"compare": "bradley_terry", "opponents": 2}) as score:
        found = score(["a" * n for n in range(1, 9)]).scores
    assert len(bounded.questions) == 8
    assert sum(found) == pytest.approx(4.0)
    assert found[7] > found[3] > found[0]


def test_a_column_may_be_the_opponent_and_each_response_is_in_each_place() -> None:
    judge = FakeJudge(prefers(longer))
    with rewards_of(judge, {"compare": "win_rate", "opponents": "gold"}) as score:
        assert score(["a", "aaa", "aaa"], {"gold": "aa"}).scores == (0.0, 1.0, 1.0)
        assert score(["a"], {"gold": "aa"}).scores == (0.0,)
    assert ["Response A:\naa\n" in text for text in judge.questions[:2]] == [False, True]


def test_a_judge_that_always_names_the_first_has_no_agreement_and_no_preference() -> None:
    judge = FakeJudge(lambda *_: "Answer: A")
    with rewards_of(judge, {"compare": "win_rate", "samples": 2}) as score:  # at temperature 0, in both orders
        found = score(["a", "b", "c"])
    assert found.scores == (0.5, 0.5, 0.5)
    assert found.parts == {"quality/agreement": (0.0, 0.0, 0.0)}
    with rewards_of(FakeJudge(prefers(lambda a, b: a < b)), {"compare": "win_rate", "samples": 2}) as score:
        found = score(["a", "b", "b"])
    assert found.parts == {"quality/agreement": (1.0, 1.0, 1.0)}


def test_both_responses_of_a_comparison_without_a_verdict_fail() -> None:
    judge = FakeJudge(lambda text, _: "Both are fine." if "bad" in text else "Answer: A")
    with rewards_of(judge, {"compare": "win_rate", "opponents": 2}) as score:
        found = score(["bad", "b", "c", "d", "e"])
    assert sorted(error.sample for error in found.errors) == [0, 1, 4]  # a ring of five
    assert "ends in neither `Answer: A` nor `Answer: B`: 'Both are fine.'" in found.errors[0].message
    with rewards_of(judge, {"compare": "win_rate", "opponents": 2}, on_error=-1.0) as score:
        found = score(["bad", "b", "c", "d", "e"])
    assert found.scores == (-1.0, -1.0, 0.5, 0.5, -1.0)  # c and d have all their games
    assert len(found.scored_errors) == 3
    with rewards_of(judge, {"compare": "win_rate", "opponents": "gold"}, on_error=-1.0) as score:
        assert score(["bad", "b"], {"gold": "g"}).scores == (-1.0, 0.0)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rubric": {}}, "at least 1 item"),
        ({"rubric": {"a": {"criterion": "x", "weight": 0}}}, "`rubric` has no weight above 0"),
        ({"rubric": {"a": {"criterion": "x", "weight": -1}}}, "`rubric` has no weight above 0"),
        ({"rubric": {"a": {"function": "math_answer"}}}, "leaves nothing to the judge"),
        ({"rubric": {"a": {}}}, "give either `criterion`"),
        ({"rubric": {"a": {"criterion": "x", "function": "math_answer"}}}, "give either `criterion`"),
        ({"rubric": {"a": {"criterion": "x", "scale": [1, 1]}}}, "it must rise"),
        ({"rubric": {"a": {"criterion": "like {response}"}}}, "`criterion` may hold only columns"),
        ({"rubric": {"a": {"criterion": "like {"}}}, "Single"),
        ({"rubric": {"1": {"criterion": "x"}}}, "match pattern"),
        ({"rubric": "column", "prompt": "{response}"}, "must hold {criteria}"),
        ({"prompt": "{response} {criteria}"}, "there is no `rubric`"),
        ({"rubric": "column", "compare": "win_rate", "prompt": "{criteria}{response_a}{response_b}"}, "two rewards"),
        ({"compare": "win_rate", "prompt": "{response}"}, "must hold {response_a} and {response_b}"),
        ({"compare": "win_rate", "prompt": "{response_a} {response_b} {result}"}, "two sessions are compared"),
        ({"compare": "bradley_terry", "opponents": "gold"}, "use win_rate"),
        ({"compare": "win_rate", "opponents": 0}, "greater than 0"),
        ({"samples": 2}, "at `request.temperature` 0 all judgements"),
        ({"compare": "win_rate", "samples": 3}, "at `request.temperature` 0 all judgements"),
    ],
)
def test_bad_settings_of_a_judge(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        JudgeConfig(model="m", **given)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "expected a list with one criterion or more"),
        (None, "expected a list with one criterion or more"),
        ("be nice", "is a text that is not the JSON of a list"),
        ([{"weight": 1}], "as criterion 1, expected an object with the text `criterion`"),
        (["be nice"], "as criterion 1, expected an object"),
        ([{"criterion": "a", "weight": "2"}], "has the weight '2' in criterion 1"),
        ('[{"criterion": "a", "weight": NaN}]', "has the weight nan"),
        ([{"criterion": "a", "weight": 0}], "no criterion with a weight above 0"),
    ],
)
def test_a_bad_rubric_of_a_row_is_named_with_its_place(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_rubric(value)
    specs = specs_of("http://127.0.0.1:9/v1", {"rubric": "rubric"})
    good = {"rubric": [{"criterion": "a"}]}
    rows = [
        Row(file="d.jsonl", line=line, columns=columns) for line, columns in enumerate([good, {"rubric": value}], 1)
    ]
    with pytest.raises(UserError, match=r"d.jsonl:2: column `rubric`, the rubric of rewards.quality, .*" + why):
        check_rewards(specs, rows, "data.train")


def test_columns_of_a_rubric_are_checked_before_the_run() -> None:
    rows = [Row(file="d.jsonl", line=1, columns={"prompt": "p", "other": "1"})]
    for judge, missing in (
        ({"rubric": "rubric"}, r"rewards.quality.judge: names \{rubric\}, and the rows of data.train have other"),
        ({"compare": "win_rate", "opponents": "gold"}, r"rewards.quality.judge: names \{gold\}"),
        ({"rubric": RUBRIC}, r"rewards.quality.judge: names \{answer\}"),
        ({"prompt": "{response} {response_b}"}, r"rewards.quality.judge: names \{response_b\}"),
        ({"rubric": {"a": {"criterion": "{criteria}"}}}, r"rewards.quality.judge: names \{criteria\}"),
        (
            {"compare": "win_rate", "prompt": "{response_a} {response_b} {response}"},
            r"rewards.quality.judge: names \{response\}",
        ),
        (
            {"rubric": {"a": {"criterion": "x"}, "b": {"function": "math_answer"}}},
            "rewards.quality.judge.rubric.b.function: `math_answer` needs the column `answer`",
        ),
    ):
        with pytest.raises(UserError, match=missing):
            check_rewards(specs_of("http://127.0.0.1:9/v1", judge), rows, "data.train")


def test_a_request_may_replace_the_schema() -> None:
    (spec,) = specs_of("http://h/v1", {"rubric": RUBRIC, "request": {"response_format": {"type": "json_object"}}})
    assert spec.remote is not None
    assert spec.remote.judge is not None
    body = question(spec.remote.judge, {"question": "q", "response": "r", "answer": "4"})
    assert body["response_format"] == {"type": "json_object"}
