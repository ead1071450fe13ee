"""Rewards are checked against the rows, and arguments of vLLM's engine against its names, before a run."""

from __future__ import annotations

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.validation.engine_args import OWNED
from rlhf.data.sources import Row
from rlhf.errors import UserError
from rlhf.preflight.engine_args import known_engine_args, refuse_unknown_engine_args
from rlhf.preflight.sources import check_rewards, load_rewards, refuse_unused_rewards
from rlhf.rewards.scoring import RewardSpec
from tests.fixtures.configs import ONLINE, changed, refusal
from tests.fixtures.sources import keywords


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


def cluster(**arguments: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"roles": {"rollout": {"engine_args": arguments}}})


def test_names_are_those_of_the_installed_vllm() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert known_engine_args() == {name for name in fields if not name.startswith("_")}


def test_every_argument_that_the_project_sets_is_owned_or_may_be_changed() -> None:
    changeable = "async_scheduling attention_backend block_size compilation_config enable_chunked_prefill "
    changeable += "enable_prefix_caching hf_overrides max_num_batched_tokens override_generation_config"
    ours = keywords("actors/rollout/vllm_engine.py", "EngineArgs")
    assert ours - set(changeable.split()) <= OWNED.keys() <= known_engine_args()


def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unknown_engine_args(cluster(enable_expert_parallel=True, kv_offloading_size=16))
    with pytest.raises(UserError, match=r"engine_args\.enable_expert_paralel: vllm.* did you mean enable_expert_paral"):
        refuse_unknown_engine_args(cluster(enable_expert_paralel=True))
    with pytest.raises(UserError, match=r"engine_args\.zzz: .*its EngineArgs lists all names"):
        refuse_unknown_engine_args(cluster(zzz=1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_unknown_engine_args(cluster(zzz=1))  # without vLLM the engines check the names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{max_model_len: 8}", "max_model_len: follows from data.max_prompt_tokens and rollouts.max_new_tokens"),
        ("{async_scheduling: true}", "async_scheduling: is true, but cluster.device is cpu, where vLLM has none"),
        ("{speculative_config: {method: eagle}}", "speculative_config: is not a mapping with method: ngram"),
        ("{speculative_config: {method: ngram, draft_sample_method: x}}", "has draft_sample_method, but with"),
        ("{enable_chunked_prefill: true}", "enable_chunked_prefill: is true, but cluster.device is cpu"),
    ],
)
def test_arguments_of_other_keys_are_refused_at_load(given: str, message: str) -> None:
    assert message in refusal(ONLINE, [f"cluster.roles.rollout.engine_args={given}"])


@pytest.mark.parametrize(
    "overrides",
    [["rollouts.min_p=0.1"], ["rollouts.carry_over=true", "rollouts.oversample=1.5", "algorithm.correction=none"]],
)
def test_keys_that_drafts_would_not_follow_are_refused(overrides: list[str]) -> None:
    drafts = "cluster.roles.rollout.engine_args={speculative_config: {method: ngram, num_speculative_tokens: 4}}"
    changed(ONLINE, overrides)  # without drafts nothing is refused
    message = f"{overrides[0].partition('=')[0]}: is .*, but speculative_config is set"
    assert re.search(message, refusal(ONLINE, [*overrides, drafts]))
