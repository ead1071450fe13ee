"""Rewards by column, with gates or of a service are checked against the rows before a run."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.rewards import RewardConfig
from rlhf.data.sources import Row
from rlhf.errors import UserError
from rlhf.preflight.sources import check_rewards, load_rewards, refuse_unused_rewards
from rlhf.rewards.scoring import RewardSpec


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(file="d.jsonl", line=i, columns={"prompt": "p", **one}) for i, one in enumerate(columns, start=1)]


def specs(**rewards: dict[str, Any]) -> tuple[RewardSpec, ...]:
    configs = {name: RewardConfig.model_validate(one) for name, one in rewards.items()}
    return load_rewards(configs, beside=Path.cwd(), memory_gib=8.0)


MATHS = {"function": "last_number", "only": {"kind": ["maths", "sums"]}}
CODE = {"url": "http://127.0.0.1:9/", "only": {"kind": ["code"]}}
JUDGE = {"url": "http://127.0.0.1:9/v1", "judge": {"model": "m", "prompt": "{response} {answer}"}}
OF_RESULT = {"url": "http://127.0.0.1:9/v1", "judge": {"model": "m", "prompt": "{result} {answer}"}}
GATED = {"url": "http://127.0.0.1:9/", "gate": "maths"}
PLAIN = {"function": "last_number", "only": {"kind": ["maths"]}}
DAY = datetime.date(2026, 1, 1)
RIGHT, CODED = {"kind": "maths", "answer": "1"}, {"kind": "code"}


def nested(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("rewards", "columns"),
    [
        ({"maths": MATHS, "code": CODE}, [{"kind": "sums", "answer": "1"}, CODED]),
        ({}, [CODED]),  # without rewards a row needs no column
        ({"code": CODE, "other": PLAIN}, [RIGHT | {"day": DAY}, CODED]),  # a function may get a value that is no JSON
        ({"taste": JUDGE}, [{"answer": "1", "day": DAY}]),  # the judge is not asked about the day
    ],
)
def test_rows_with_the_columns_of_their_rewards_pass(rewards: dict[str, Any], columns: list[dict[str, Any]]) -> None:
    check_rewards(specs(**rewards), rows(*columns), "data.train")


@pytest.mark.parametrize(
    ("rewards", "columns", "message"),
    [
        (
            {"maths": MATHS, "code": CODE},
            [{"kind": "maths"}, CODED | {"answer": "1"}],
            "rewards.maths.function: `last_number` needs the column `answer`",
        ),
        ({"maths": MATHS, "code": CODE}, [CODED, {"kind": "Code"}], "d.jsonl:2: no reward applies to the row"),
        (
            {"maths": MATHS, "short": GATED},
            [RIGHT, CODED],
            "rewards.short.gate: maths does not apply to d.jsonl:2, and short does",
        ),
        ({"maths": MATHS}, [RIGHT, {"answer": nested(900)}], "d.jsonl:2: its columns are nested deeper than 64 levels"),
        ({"code": CODE}, [CODED | {"day": DAY}], "d.jsonl:1: cannot be sent to rewards.code as JSON: .*date"),
        ({"taste": JUDGE}, [{"kind": "x"}], r"taste.judge.prompt: has \{answer\}, and the rows of data.train"),
        ({"taste": OF_RESULT}, [{"answer": "1"}], r"taste.judge.prompt: has \{result\}, and the rows of data.train"),
    ],
)
def test_rows_that_a_reward_cannot_score_are_refused(
    rewards: dict[str, Any], columns: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_rewards(specs(**rewards), rows(*columns), "data.train")

    if "taste" in rewards:  # a judge may ask about the result of an agent
        check_rewards(specs(taste=OF_RESULT), rows({"answer": "1"}), "data.train", of_sessions=("result",))


def test_values_are_compared_with_their_types() -> None:
    (spec,) = specs(one={"function": "last_number", "only": {"level": [1, True]}})
    assert [value for value in (1, True, "1", 1.0, None) if spec.applies_to({"level": value})] == [1, True]
    (spec,) = specs(one={"function": "last_number", "only": {"level": [1], "kind": ["a"]}})
    assert spec.applies_to({"level": 1, "kind": "a"})
    assert not spec.applies_to({"level": 1})
    assert not spec.applies_to({"level": True, "kind": "a"})


def test_a_reward_for_no_row_of_the_training_data_is_refused() -> None:
    found = specs(maths=MATHS, code=CODE)
    refuse_unused_rewards(found, [{"kind": "maths"}, {"kind": "code"}])
    with pytest.raises(UserError, match=r"rewards.code.only: applies to no row .* where `kind` is the string 'maths'"):
        refuse_unused_rewards(found, [{"kind": "maths"}])
    with pytest.raises(UserError, match="there is no column `kind`"):
        refuse_unused_rewards(found, [{"sort": "maths"}])


def test_the_token_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"url": "https://judge.example/v1", "token_env": "JUDGE_KEY"}
    with pytest.raises(UserError, match=r"rewards.taste.token_env: the environment variable JUDGE_KEY is not set"):
        specs(taste=config)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="JUDGE_KEY holds more than plain text"):
        specs(taste=config)
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    (spec,) = specs(taste=config)
    assert spec.remote.service.token == "s3cret"
    assert "s3cret" not in repr(spec)
