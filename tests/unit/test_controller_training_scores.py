"""Reported and training scores differ, for groups with rewards of some rows only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rlhf.config.schema.rewards import RewardConfig
from rlhf.controller.rollout_report import by_reward, rollout_metrics
from rlhf.controller.training_scores import TrainingScores
from rlhf.roles import ScoredGroup
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.types import GroupScores
from tests.fakes.groups import completed_group, group_request


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
    # maths of group 0: -+1 over std sqrt(2), times 10; style as it is
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
