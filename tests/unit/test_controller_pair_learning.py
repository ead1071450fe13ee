"""A step learns from pairs of scored groups."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, cast

import pytest

from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.pair_learning import PairLearning
from rlhf.tracking.run_folder.folder import RunFolder
from tests.fakes.configs import online_config
from tests.fakes.groups import scored_groups
from tests.fakes.records import quiet_record
from tests.fakes.roles import FakePolicy, FakeReference


class Run:
    """A run's learning with all roles, in a folder."""

    def __init__(self, folder: RunFolder) -> None:
        config = online_config(
            algorithm={"name": "online_dpo"},
            rollouts={"samples_per_prompt": 3},
            train={"sequences_per_update": 2, "epochs_per_batch": 3},
        )
        self.policy, self.reference = FakePolicy(reports=False), FakeReference()
        roles: Any = {"policy": self.policy, "reference": self.reference}
        self.record, unused = quiet_record(folder), cast(Any, None)
        self.learning = PairLearning(
            config, OnlineRoles(**roles, rollout=unused, reward=unused, critic=None), self.record
        )

    def learn(self, *scores: Sequence[float], step: int = 1) -> Signals:
        self.record.begin_step(1)
        return asyncio.run(self.learning.learn(scored_groups(*scores), step))


BEST_SECOND, EQUAL, BEST_LAST = (0.0, 2.0, 1.0), (1.0, 1.0, 1.0), (0.5, 0.0, 3.0)


def test_the_best_and_the_worst_of_each_group_are_trained_on(folder: RunFolder) -> None:
    run = Run(folder)
    signals = run.learn(BEST_SECOND, EQUAL, BEST_LAST, BEST_LAST)
    plan = run.policy.plan
    assert plan is not None
    dealt_out = [ids for minibatch in plan.minibatches for ids in minibatch.sequences_by_rank]
    pairs = sorted(ids[i : i + 2] for ids in dealt_out for i in range(0, len(ids), 2))
    assert pairs == [(1, 0), (8, 7), (11, 10)]
    assert run.reference.only == {0, 1, 7, 8, 10, 11}
    whole = ["group 0", "group 2", "group 3"]
    assert (run.policy.rollouts, run.policy.references) == (whole, [f"reference of {one}" for one in whole])
    assert len(run.policy.updates) == 2 * 3  # two minibatches, three epochs
    assert signals.preferred == {1: True, 0: False, 8: True, 7: False, 11: True, 10: False}
    row = run.record.row()
    assert row["preference/pairs/total"] == 3
    assert row["advantages/zero_groups/fraction"] == 0.25


def test_without_a_preference_the_policy_stays(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(folder)
    with caplog.at_level(logging.WARNING):
        signals = run.learn(EQUAL, EQUAL, EQUAL, EQUAL, step=7)
    assert "step 7: all responses to each prompt have the same score, so the policy is not updated" in caplog.text
    assert (run.policy.plan, run.policy.updates, signals.preferred) == (None, [], {})
    row = run.record.row()
    assert (row["preference/pairs/total"], row["advantages/zero_groups/fraction"]) == (0, 1.0)
    assert row["time/update_s"] > 0.0  # by which the throughput is divided
