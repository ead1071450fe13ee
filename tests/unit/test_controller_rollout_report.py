"""Metrics of a batch from its scalars, of sessions and of rewards of some rows, and the scores for training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from rlhf.config.schema.rewards import RewardConfig
from rlhf.controller.learning import Signals
from rlhf.controller.rollout_report import by_reward, environment_failures, group_samples, rollout_metrics
from rlhf.controller.training_scores import TrainingScores
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.tracking.logs import MASK
from rlhf.tracking.metrics.declarations import is_declared
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.types import GroupRequest, GroupScores, RewardError, RolloutInfo, SessionEnd
from tests.fakes.groups import completed_group, group_request, rollout_info

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


def group(index: int, scores: tuple[float, ...], by_name: dict[str, tuple[float, ...]]) -> ScoredGroup:
    completed = completed_group(group_request(index, samples=len(scores)), object())
    return ScoredGroup(group=completed, scores=GroupScores(scores=scores, by_name=by_name, errors=()))


GROUPS = [group(0, (5.0, 7.0), {"maths": (1.0, 3.0), "style": (4.0, 4.0)}), group(1, (2.0, 6.0), {"style": (2.0, 6.0)})]


def scores(**given: dict[str, Any]) -> TrainingScores:
    return TrainingScores({name: RewardConfig(function="f", **one) for name, one in given.items()})


def test_a_reward_counts_where_it_applies() -> None:
    assert by_reward(scored.scores.by_name for scored in GROUPS) == {"maths": [1.0, 3.0], "style": [4.0, 4.0, 2.0, 6.0]}
    found = rollout_metrics(GROUPS, version=0)
    assert found["rewards/maths/mean"].result() == 2.0  # (1 + 3) / 2
    assert found["rewards/style/mean"].result() == 4.0  # (4 + 4 + 2 + 6) / 4
    assert "rewards/code/mean" not in found


def test_a_reward_without_an_opinion_is_in_no_mean_and_is_counted() -> None:
    silent = [group(0, (1.0, 3.0), {"maths": (1.0, None), "style": (None, None)})]
    metrics = rollout_metrics(silent, version=0)
    assert metrics["rewards/maths/mean"].result() == 1.0
    assert metrics["rewards/maths/no_opinion/fraction"].result() == 0.5
    assert "rewards/style/mean" not in metrics
    assert metrics["rewards/style/no_opinion/fraction"].result() == 1.0
    assert scores(maths={}, style={"gate": "maths"}).by_reward(silent) == {"maths": [1.0, None], "style": [None, None]}


def test_training_sees_normalised_rewards_and_reports_do_not() -> None:
    normalised = scores(maths={"normalize": "group", "weight": 10.0}, style={}).normalized(GROUPS)
    # maths of group 0: -+1 over std sqrt(2), times 10; style unchanged
    assert normalised[0].scores.scores == pytest.approx((4 - 10 * math.sqrt(0.5), 4 + 10 * math.sqrt(0.5)), abs=1e-4)
    assert normalised[1].scores.scores == (2.0, 6.0)
    assert GROUPS[0].scores.scores == (5.0, 7.0)
    assert [one.scores.by_name for one in normalised] == [one.scores.by_name for one in GROUPS]


def test_without_normalisation_they_are_the_same() -> None:
    assert scores(maths={}, style={"gate": "maths"}).normalized(GROUPS) == GROUPS


def test_an_algorithm_that_compares_by_reward_sees_gates_and_rows() -> None:
    found = scores(maths={"weight": 9.0}, style={}).by_reward(GROUPS)
    assert found == {"maths": [1.0, 3.0, 0.0, 0.0], "style": [4.0, 4.0, 2.0, 6.0]}
    (first, _) = GROUPS
    assert scores(maths={}, style={"gate": "maths"}).by_reward([first])["style"] == [4.0, 12.0]  # 4 * 1, 4 * 3


def test_the_lag_of_a_response_is_that_of_its_oldest_token() -> None:
    infos = [replace(GROUPS[0].group.infos[0], min_version=oldest, max_version=7) for oldest in (7, 4, 4, 6)]
    batch = [replace(GROUPS[0], group=replace(GROUPS[0].group, infos=tuple(infos)))]
    metrics = rollout_metrics(batch, version=7)
    histogram = metrics["experience/policy_lag/histogram"]
    assert isinstance(histogram, Histogram)
    assert histogram.counts[:5] == (1, 1, 0, 2, 0)  # lags 0, 3, 3 and 1
    assert metrics["experience/policy_lag/mean"].result() == 7 / 4
    assert metrics["experience/policy_lag/max"].result() == 3.0
