"""A step learns from a teacher: each role is called for the right rows, and scores are optional."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from rlhf.controller.distillation_learning import DistillationLearning
from rlhf.controller.evaluation import compare_with_teacher
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.rollout_report import group_samples, rollout_metrics
from rlhf.roles import ScoredGroup
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.types import BatchPlan, GivenResponse
from tests.fakes.configs import online_config
from tests.fakes.groups import scored_groups
from tests.fakes.records import quiet_record
from tests.fakes.roles import FakePolicy, FakeTeacher

SAMPLES = 2


def groups(*scores: Sequence[float]) -> list[ScoredGroup]:
    """Return groups of two responses of 1 and 3 tokens."""
    return scored_groups(*scores, samples=SAMPLES, tokens=(1, 3))


class Run:
    def __init__(
        self,
        folder: RunFolder,
        *,
        apart: bool = False,
        samples: int = 3,
        teacher: Any = None,
        temperature: float = 0.8,
        **algorithm: Any,
    ) -> None:
        self.config = online_config(
            teacher=teacher or {"model": "n"},
            algorithm={"name": "on_policy_distillation", **algorithm},
            rollouts={"samples_per_prompt": SAMPLES, "temperature": temperature},
            rewards={},
            train={"sequences_per_update": 4, "epochs_per_batch": 2},
            eval={"temperature": 0.0, "samples_per_prompt": SAMPLES},
            tracking={"samples_per_step": samples},
            cluster={"roles": {"teacher": {"colocate_with": None if apart else "policy"}}},
        )
        self.calls: list[str] = []
        self.student, self.teacher = FakePolicy(self.calls, reports=False, slow=True), FakeTeacher(self.calls)
        roles: Any = {"policy": self.student, "teacher": self.teacher}
        self.record, unused = quiet_record(folder), cast(Any, None)
        self.record.begin_step(1)
        self.learning = DistillationLearning(
            self.config, OnlineRoles(**roles, rollout=unused, reward=unused, reference=None, critic=None), self.record
        )

    @property
    def plan(self) -> BatchPlan:
        assert self.student.plan is not None
        return self.student.plan

    def learn(self, *scores: Sequence[float]) -> Signals:
        return asyncio.run(self.learning.learn(groups(*scores), 1))


def test_of_sampled_tokens_log_probabilities_are_asked_for_once(folder: RunFolder) -> None:
    run = Run(folder)
    signals = run.learn((), (), (), ())
    assert run.student.references == [f"teacher of group {i}" for i in range(4)]
    assert run.plan.scores == {}
    assert run.calls.count("updated") == 2 * 2  # two minibatches, two epochs
    assert all(" by " not in call for call in run.calls if call.startswith("update "))
    # three samples come from two groups
    assert run.teacher.means_of == {
        "rollouts": ["group 0", "group 1"],
        "temperature": 0.8,
        "samples_per_prompt": SAMPLES,
        "teacher": "teacher",
    }
    assert signals.teacher_logprobs == {0: -2.0, 1: -3.0, 2: -4.0, 3: -5.0}
    row = run.record.row()
    assert {"time/teacher_s", "time/experience_s", "time/update_s"} <= set(row)


def test_no_sample_is_asked_for_where_none_is_written(folder: RunFolder) -> None:
    run = Run(folder, samples=0)
    assert run.learn((), (), (), ()).teacher_logprobs == {}
    assert run.teacher.means_of == {}


def test_rewards_are_not_trained_on_unless_they_weigh_something(folder: RunFolder) -> None:
    run = Run(folder)
    run.learn((0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (0.0, 0.0))
    assert run.plan.scores == {}
    run = Run(folder, reward_coef=0.5)
    run.learn((0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (0.0, 0.0))
    # unbiased deviations: 0.7071 and 1.4142, so the advantages of the groups that differ are +- 0.7071, halved
    expected = [-0.35355, 0.35355, 0.0, 0.0, 0.35355, -0.35355, 0.0, 0.0]
    assert [run.plan.scores[i] for i in range(8)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_states_are_those_of_the_minibatch_that_is_updated_on(folder: RunFolder, apart: bool) -> None:
    run = Run(folder, apart=apart, divergence="reverse_kl")
    run.learn((), (), (), ())
    assert run.student.references == []
    of = [sorted(i for share in one.sequences_by_rank for i in share) for one in run.plan.minibatches]
    updates = [call for call in run.calls if call.startswith("update ")]
    assert [call.split()[1] for call in updates].count("0") == 2
    assert all(call == f"update {call.split()[1]} by states of {of[int(call.split()[1])]}" for call in updates)
    words = [call.split()[0] for call in run.calls if not call.startswith("prepare")]
    if apart:  # the next states are requested during the student's update
        assert words == ["teach", *["update", "teach", "updated"] * 3, "update", "updated"]
    else:
        assert words == ["teach", "update", "updated"] * 4


NAMED = {"math": {"model": "n"}, "code": {"model": "m"}}
SOURCES = ("math", "code", "math", "code")


def by_column() -> list[ScoredGroup]:
    """Return four groups of prompts for two teachers."""
    found = []
    for scored, source in zip(groups((), (), (), ()), SOURCES, strict=True):
        prompt = replace(scored.group.request.prompt, columns={"source": source})
        request = replace(scored.group.request, prompt=prompt)
        found.append(replace(scored, group=replace(scored.group, request=request)))
    return found


def test_given_responses_learn_from_the_teacher_of_their_row(folder: RunFolder) -> None:
    run = Run(folder, teacher=NAMED, teacher_column="source", divergence="reverse_kl", on_policy_share=0.75)
    found = []
    for scored in by_column():
        given = GivenResponse(token_ids=(1, 2, 3, 4), loss_mask=(False, False, True, True))
        prompt = replace(scored.group.request.prompt, given=given)
        found.append(replace(scored, group=replace(scored.group, request=replace(scored.group.request, prompt=prompt))))
    asyncio.run(run.learning.learn(found, 1))
    owners = {i: SOURCES[i // SAMPLES] for i in range(8)} | {-1 - SAMPLES * i: name for i, name in enumerate(SOURCES)}
    assert all(one.teachers == owners for one in run.plan.minibatches)
    assert [(one.given_share, one.num_given_tokens) for one in run.plan.minibatches] == [(0.25, 4), (0.25, 4)]
    ids = sorted(i for one in run.plan.minibatches for share in one.sequences_by_rank for i in share)
    assert ids == [-7, -5, -3, -1, *range(8)]
    asked = [sorted(i for share in one.sequences_by_rank for i in share) for one in run.plan.minibatches]
    assert {call for call in run.calls if call.startswith("teach")} == {f"teach {ids}" for ids in asked}


@pytest.mark.parametrize("divergence", ["sampled_reverse_kl", "reverse_kl"])
def test_each_prompt_learns_from_the_teacher_in_its_column(folder: RunFolder, divergence: str) -> None:
    run = Run(folder, teacher=NAMED, teacher_column="source", divergence=divergence, samples=8)
    asyncio.run(run.learning.learn(by_column(), 1))
    owners = {i: SOURCES[i // SAMPLES] for i in range(8)}
    assert all(one.teachers == owners for one in run.plan.minibatches)
    asked = ["math of group 0", "math of group 2", "code of group 1", "code of group 3"]
    assert run.student.references == (asked if divergence == "sampled_reverse_kl" else [])
    assert (run.teacher.means_of["teacher"], run.teacher.means_of["rollouts"]) == ("code", ["group 1", "group 3"])


@pytest.mark.parametrize("served", [False, True])
def test_teachers_on_the_same_devices_take_turns_once_a_step(folder: RunFolder, served: bool) -> None:
    """Groups of the two teachers arrive alternately. The groups of the present teacher are computed at once."""
    url = {"url": "http://127.0.0.1:1/v1"} if served else {}
    named = {name: section | url for name, section in NAMED.items()}
    algorithm = {"teacher_column": "source", "samples": 8}
    run = Run(folder, apart=True, teacher=named, temperature=1.0 if served else 0.8, **algorithm)
    num_steps, ahead = 3, []

    async def steps() -> None:
        for step in range(1, num_steps + 1):
            run.calls.clear()
            for scored in by_column():
                run.learning.arrived(scored)
                await asyncio.sleep(0)
            ahead.append([call for call in run.calls if " of group" in call])
            await run.learning.learn(by_column(), step)
            run.learning.end_step(by_column(), Signals())
            assert sorted(run.student.references) == sorted(f"{name} of group {i}" for i, name in enumerate(SOURCES))

    asyncio.run(steps())
    if served:  # servers hold their models, so nothing changes place
        assert all(len(of_step) == 4 for of_step in ahead)
    else:
        own = [["math of group 0", "math of group 2"], ["code of group 1", "code of group 3"]]
        assert ahead == [own[0], own[1], own[0]]
        assert run.teacher.turns == ["math", "code", "math", "code"]


def test_held_out_responses_are_compared_with_the_teacher_of_their_row(folder: RunFolder) -> None:
    run = Run(folder, teacher=NAMED, teacher_column="source")
    told = {"math": {0: -2.0, 1: -2.0, 4: -2.0, 5: -2.0}, "code": {2: -5.0, 3: -5.0, 6: -5.0, 7: -5.0}}
    teacher: Any = run.teacher

    async def mean_logprobs(rollouts: Any, *, teacher: str, **_: Any) -> Any:
        return told[teacher]

    teacher.mean_logprobs = mean_logprobs
    asyncio.run(compare_with_teacher({"heldout": by_column()}, run.config, teacher, run.record))
    row = run.record.row()
    found = [row[f"eval/heldout/kl_teacher{name}"] for name in ("/math", "/code", "")]
    assert found == [1.0, 4.0, 2.5]


def test_held_out_responses_are_compared_by_the_token(folder: RunFolder) -> None:
    run = Run(folder)
    teacher: Any = run.teacher
    asyncio.run(compare_with_teacher({"heldout": groups((), ())}, run.config, teacher, run.record))
    # tokens 1, 3, 1, 3; gaps -1 - (-2 - i) = 1, 2, 3, 4: (1 + 6 + 3 + 12) / 8
    assert run.record.row()["eval/heldout/kl_teacher"] == 22 / 8
    assert run.teacher.means_of["temperature"] == 1.0  # greedy responses have log-probabilities of temperature 1


def test_metrics_and_samples_do_without_scores() -> None:
    row = rollout_metrics(groups((), ()), version=0)
    assert not [key for key in row if key.startswith("rewards/")]
    (first, _), _ = (one.records for one in group_samples(groups((), ()), Signals(), split="train", most=None))
    assert (first.score, first.scores, first.mean_teacher_logprob) == (None, {}, None)
