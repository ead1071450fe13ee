"""What a step makes of scored groups where pairs are learnt from, and when its reference becomes the policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.root import Config
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.pair_learning import PairLearning
from rlhf.controller.record import RunRecord
from rlhf.errors import UserError
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, PrepareReport, ScoredGroup
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.types import BatchPlan, GroupRequest, GroupScores, Prompt, RolloutInfo


class Policy:
    """Notes what it is given; its weights are the number of its updates."""

    num_ranks = 2

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
        self.given: tuple[list[Any], list[Any]] = ([], [])
        self.updates = 0

    async def prepare(
        self, plan: BatchPlan, groups: Sequence[CompletedGroup], references: Sequence[Any]
    ) -> PrepareReport:
        self.plan, self.given = plan, ([group.rollouts for group in groups], list(references))
        return PrepareReport(sequences=(), metrics={})

    async def update(self, minibatch: int) -> dict[str, Any]:
        self.updates += 1
        return {}

    async def export(self, folder: Path) -> None:
        (folder / "weights").write_text(str(self.updates))


class Reference:
    """Says what it was asked of; holds the weights that it became."""

    role: Role = "reference"

    def __init__(self) -> None:
        self.only: frozenset[int] | None = None
        self.weights = "initial"

    async def logprobs(
        self, groups: Sequence[CompletedGroup], *, only: frozenset[int] | None = None, temperatures: Mapping[int, float]
    ) -> list[Any]:
        self.only = only
        return [f"reference of {group.rollouts}" for group in groups]

    async def become(self, folder: Path) -> None:
        self.weights = (folder / "weights").read_text()


def groups(*scores: Sequence[float]) -> list[ScoredGroup]:
    """Groups with these scores; sequences are numbered through."""
    found = []
    for index, one in enumerate(scores):
        infos = tuple(
            RolloutInfo(
                sequence_id=index * len(one) + i,
                num_prompt_tokens=2,
                num_response_tokens=3,
                finish_reason="stop",
                min_version=0,
                max_version=0,
                mean_logprob=-1.0,
            )
            for i in range(len(one))
        )
        prompt = Prompt(prompt_id=index, token_ids=(1, 2), text="", columns={})
        request = GroupRequest(group_id=index, prompt=prompt, seeds=(0,), first_sequence_id=infos[0].sequence_id)
        rollouts: Any = f"group {index}"
        scored = GroupScores(scores=tuple(one), by_name={}, errors=())
        group = CompletedGroup(request=request, rollouts=rollouts, infos=infos)
        found.append(ScoredGroup(group=group, scores=scored))
    return found


class Run:
    """A run's learning with its roles, in a folder."""

    def __init__(self, folder: RunFolder, *, reference_every: int | None = None) -> None:
        config = Config.model_validate(
            {
                "run": {"name": "demo"},
                "policy": {"model": "m"},
                "algorithm": {"name": "online_dpo", "reference_every": reference_every},
                "data": {"train": "x.jsonl"},
                "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 3},
                "rewards": {"r": {"function": "f"}},
                "train": {"steps": 10, "lr": 1.0, "sequences_per_update": 2, "epochs_per_batch": 3},
            }
        )
        self.policy, self.reference = Policy(), Reference()
        roles: Any = {"policy": self.policy, "reference": self.reference}
        unused: Any = None
        self.record = RunRecord(
            folder=folder, tracker=unused, timeline=Timeline(folder.timeline), progress=open_progress(10, mode="quiet")
        )
        self.learning = PairLearning(
            config, OnlineRoles(**roles, rollout=unused, reward=unused, critic=None), self.record
        )

    def learn(self, *scores: Sequence[float], step: int = 1) -> Signals:
        self.record.begin_step(1)

        async def finish() -> Signals:
            signals = await self.learning.learn(groups(*scores), step)
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


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.open(tmp_path, "demo", resume=False) as opened:
        yield opened


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
    assert run.policy.given == (whole, [f"reference of {one}" for one in whole])
    assert run.policy.updates == 2 * 3  # two minibatches, three epochs
    assert signals.preferred == {1: True, 0: False, 8: True, 7: False, 11: True, 10: False}
    row = run.record.row()
    assert row["preference/pairs/total"] == 3
    assert row["advantages/zero_groups/fraction"] == 0.25


def test_without_a_preference_the_policy_stays(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(folder)
    with caplog.at_level(logging.WARNING):
        signals = run.learn(EQUAL, EQUAL, EQUAL, EQUAL, step=7)
    assert "step 7: all responses to each prompt have the same score, so the policy is not updated" in caplog.text
    assert (run.policy.plan, run.policy.updates, signals.preferred) == (None, 0, {})
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
