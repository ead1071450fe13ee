"""A step learns from pairs of scored groups, and the reference is renewed from the policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, cast

import pytest

from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.pair_learning import PairLearning
from rlhf.errors import UserError
from rlhf.tracking.run_folder.folder import RunFolder
from tests.fakes.configs import online_config
from tests.fakes.groups import scored_groups
from tests.fakes.records import quiet_record
from tests.fakes.roles import FakePolicy, FakeReference


class Run:
    """A run's learning with all roles, in a folder."""

    def __init__(self, folder: RunFolder, *, reference_every: int | None = None) -> None:
        config = online_config(
            algorithm={"name": "online_dpo", "reference_every": reference_every},
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

        async def finish() -> Signals:
            signals = await self.learning.learn(scored_groups(*scores), step)
            if self.learning.renews_reference(step):
                await self.learning.renew_reference(step)
            return signals

        return asyncio.run(finish())

    def checkpoint(self, step: int) -> None:
        folder = self.record.folder
        self.record.write_state(folder.begin_checkpoint(step), {"step": step, **self.learning.state()})
        folder.seal(folder.checkpoint(step), step=step)
        folder.commit_checkpoint(step)

    def restore(self, step: int) -> None:
        asyncio.run(self.learning.restore(self.record.read_state(step), step))


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


def test_the_reference_becomes_the_policy_and_a_resumed_run_has_that_of_its_checkpoint(folder: RunFolder) -> None:
    run = Run(folder, reference_every=2)
    seen = []
    for step in range(1, 6):
        run.learn(BEST_SECOND, EQUAL, EQUAL, EQUAL, step=step)  # one pair: three updates
        seen.append(run.reference.weights)
        if step in (1, 3):
            run.checkpoint(step)
    assert seen == ["initial", "6", "6", "12", "12"]
    assert [path.name for path in sorted(folder.references.iterdir())] == ["step_000002", "step_000004"]

    again = Run(folder, reference_every=2)
    again.restore(1)
    assert again.reference.weights == "initial"
    again.restore(3)
    assert again.reference.weights == "6"
    assert again.learning.state() == {"reference_step": 2}
    folder.reference(2).rename(folder.reference(3))
    with pytest.raises(UserError, match=r"the checkpoint of step 3 needs its reference .*step_000002\. .*is missing"):
        Run(folder, reference_every=2).restore(3)


def test_a_reference_that_no_checkpoint_needs_is_removed(folder: RunFolder) -> None:
    run = Run(folder, reference_every=1)
    for step in (1, 2, 3):
        run.learn(BEST_SECOND, EQUAL, EQUAL, EQUAL, step=step)
    assert [path.name for path in folder.references.iterdir()] == ["step_000003"]
