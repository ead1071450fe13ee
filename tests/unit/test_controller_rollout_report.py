"""Metrics of an agent's sessions, from their scalars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from rlhf.controller.learning import Signals
from rlhf.controller.rollout_report import environment_failures, group_samples, rollout_metrics
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.tracking.logs import MASK
from rlhf.tracking.metrics.declarations import is_declared
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.types import GroupRequest, GroupScores, RewardError, RolloutInfo, SessionEnd
from tests.fakes.groups import group_request, rollout_info

REQUEST = group_request(3, samples=2, first_sequence_id=0)


def info(sample: int, *, calls: int, broken: int, restricted: Mapping[str, int]) -> RolloutInfo:
    session = SessionEnd(result='"4"', num_calls=calls, broken=("edited history",) * broken, restricted=restricted)
    tokens = {"num_response_tokens": 6, "num_environment_tokens": 10 * sample}
    return rollout_info(sample, min_version=1, max_version=1, num_turns=calls, session=session, **tokens)


INFOS = (info(0, calls=1, broken=0, restricted={"tool_choice": 3}), info(1, calls=3, broken=2, restricted={}))


def scored(request: GroupRequest = REQUEST, infos: Sequence[RolloutInfo] = INFOS) -> ScoredGroup:
    group: Any = CompletedGroup(request=request, rollouts=cast(Any, None), infos=tuple(infos))
    scores = GroupScores(scores=(1.0, 0.0), by_name={"right": (1.0, 0.0)}, errors=())
    return ScoredGroup(group=group, scores=scores)


def test_sessions_have_metrics_of_their_own() -> None:
    found = rollout_metrics([scored()], version=1)
    values = {name: metric.result() for name, metric in found.items() if name.startswith("agents/")}
    assert values == {
        "agents/calls/mean": 2.0,
        "agents/calls/max": 3.0,
        "agents/broken_prefixes/fraction": 0.5,
        "agents/broken_by_edited_history/total": 2.0,
        "agents/restricted_tokens/fraction": 0.2,  # 3 of 3 + 6 + 6
        "agents/restricted_by_tool_choice/total": 3.0,
        "agents/inserted_tokens/mean": 5.0,
    }
    assert all(map(is_declared, found))
    assert "rollouts/turns/mean" not in found


def test_samples_say_why_prefixes_broke() -> None:
    (selection,) = group_samples([scored()], Signals(), split="train", most=None)
    assert [record.broken for record in selection.records] == [(), ("edited history", "edited history")]


def test_samples_have_the_row_and_the_agents_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-long-secret")
    columns = {"messages": [{"role": "user"}], "secret": "red", "days": [1, float("nan")], "tests": "x" * 5000}
    request = replace(REQUEST, prompt=replace(REQUEST.prompt, columns=columns))
    results = ('{"guess": "red", "env": "a-long-secret"}', json.dumps(["y"] * 2000))
    ended = [replace(one, session=replace(one.session, result=r)) for one, r in zip(INFOS, results, strict=True)]  # type: ignore[type-var]
    (selection,) = group_samples([scored(request, ended)], Signals(), split="train", most=None)
    path = samples_path(tmp_path, 1)
    write_samples(path, selection.records)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["columns"] == second["columns"] == {"secret": "red", "days": [1, None], "tests": "x" * 4096}
    assert first["result"] == {"guess": "red", "env": MASK}
    assert first["shortened"] == {"columns.tests": 5000}
    assert (first["masked"], second["masked"]) == (["result"], [])
    assert second["shortened"] == {"columns.tests": 5000, "result": 10_000}
    assert second["result"] == json.dumps(["y"] * 2000)[:4096]


def test_failures_of_agents_are_counted() -> None:
    late = RewardError(reward="agent", kind="timeout", message="late", prompt_id=3, sample=1)
    found = environment_failures((INFOS[0], replace(INFOS[1], environment_error=late)))
    assert {name: metric.result() for name, metric in found.items()} == {
        "agents/errors/total": 1.0,
        "agents/timeouts/total": 1.0,
    }
