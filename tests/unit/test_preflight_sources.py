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


def test_each_row_needs_the_columns_of_its_own_rewards() -> None:
    found = specs(maths=MATHS, code=CODE)
    check_rewards(found, rows({"kind": "sums", "answer": "1"}, {"kind": "code"}), "data.train")
    with pytest.raises(UserError, match=r"rewards.maths.function: `last_number` needs the column `answer`"):
        check_rewards(found, rows({"kind": "maths"}, {"kind": "code", "answer": "1"}), "data.train")


def test_a_row_without_a_reward_is_named() -> None:
    with pytest.raises(UserError, match=r"d.jsonl:2: no reward applies to the row, by `kind`"):
        check_rewards(specs(maths=MATHS, code=CODE), rows({"kind": "code"}, {"kind": "Code"}), "data.train")


def test_a_run_without_rewards_asks_nothing_of_its_rows() -> None:
    check_rewards((), rows({"kind": "code"}), "data.train")


def test_a_gate_must_apply_where_its_reward_does() -> None:
    found = specs(maths=MATHS, short={"url": "http://127.0.0.1:9/", "gate": "maths"})
    with pytest.raises(UserError, match=r"rewards.short.gate: maths does not apply to d.jsonl:2, and short does"):
        check_rewards(found, rows({"kind": "maths", "answer": "1"}, {"kind": "code"}), "data.train")


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


def test_a_row_that_is_nested_too_deep_for_a_reward_is_named() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(UserError, match=r"d.jsonl:2: its columns are nested deeper than 64 levels"):
        check_rewards(specs(maths=MATHS), rows({"kind": "maths", "answer": "1"}, {"answer": deep}), "data.train")


def test_what_a_service_is_sent_must_be_json() -> None:
    found = specs(code=CODE, other={"function": "last_number", "only": {"kind": ["maths"]}})
    day = datetime.date(2026, 1, 1)
    check_rewards(found, rows({"kind": "maths", "answer": "1", "day": day}, {"kind": "code"}), "data.train")
    with pytest.raises(UserError, match=r"d.jsonl:1: cannot be sent to rewards.code as JSON: .*date"):
        check_rewards(found, rows({"kind": "code", "day": day}), "data.train")


def test_the_columns_of_a_judges_question_must_be_there() -> None:
    judge = {"model": "m", "prompt": "{response} {answer}"}
    found = specs(taste={"url": "http://127.0.0.1:9/v1", "judge": judge})
    check_rewards(found, rows({"answer": "1", "day": datetime.date(2026, 1, 1)}), "data.train")  # not asked about
    with pytest.raises(UserError, match=r"rewards.taste.judge.prompt: has \{answer\}, and the rows of data.train"):
        check_rewards(found, rows({"kind": "x"}), "data.train")


def test_a_judge_may_ask_about_the_result_of_an_agent() -> None:
    judge = {"model": "m", "prompt": "{result} {answer}"}
    found = specs(taste={"url": "http://127.0.0.1:9/v1", "judge": judge})
    check_rewards(found, rows({"answer": "1"}), "data.train", of_sessions=("result",))
    with pytest.raises(UserError, match=r"rewards.taste.judge.prompt: has \{result\}, and the rows of data.train have"):
        check_rewards(found, rows({"answer": "1"}), "data.train")


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
