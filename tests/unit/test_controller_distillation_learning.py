"""What a step makes of responses where a teacher is learnt from: who is asked for what, and scores are optional."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.root import Config
from rlhf.controller.distillation_learning import DistillationLearning
from rlhf.controller.evaluation import compare_with_teacher
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_report import group_samples, rollout_metrics
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, PrepareReport, ScoredGroup
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.types import BatchPlan, GroupRequest, GroupScores, MinibatchPlan, Prompt, RolloutInfo

SAMPLES = 2


class Student:
    """Takes its time, and notes what it is given."""

    num_ranks = 2

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def prepare(self, plan: BatchPlan, groups: Sequence[Any], told: Sequence[Any]) -> PrepareReport:
        self.plan, self.told = plan, list(told)
        return PrepareReport(sequences=(), metrics={})

    async def update(self, minibatch: int, states: Any = ()) -> dict[str, Any]:
        self.calls.append(f"update {minibatch} by {states}")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.calls.append("updated")
        return {}


class Teacher:
    """Says what it was asked of."""

    role: Role = "teacher"

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.asked: dict[str, Any] = {}

    async def logprobs(self, groups: Sequence[CompletedGroup], *, temperatures: Mapping[int, float]) -> list[str]:
        return [f"teacher of {group.rollouts}" for group in groups]

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> str:
        ids = sorted(i for share in plan.sequences_by_rank for i in share)
        assert len(groups) == 4
        self.calls.append(f"teach {ids}")
        return f"states of {ids}"

    async def mean_logprobs(self, rollouts: Sequence[Any], **asked: Any) -> Mapping[int, float]:
        self.asked = {"rollouts": list(rollouts), **asked}
        return {i: -2.0 - i for i in range(SAMPLES * len(rollouts))}


def groups(*scores: Sequence[float]) -> list[ScoredGroup]:
    """Groups of two responses of 1 and 3 tokens, with these scores or with none."""
    found = []
    for index, one in enumerate(scores):
        infos = tuple(
            RolloutInfo(
                sequence_id=SAMPLES * index + i,
                num_prompt_tokens=2,
                num_response_tokens=1 + 2 * i,
                finish_reason="stop",
                min_version=0,
                max_version=0,
                mean_logprob=-1.0,
            )
            for i in range(SAMPLES)
        )
        prompt = Prompt(prompt_id=index, token_ids=(1, 2), text="", columns={})
        request = GroupRequest(group_id=index, prompt=prompt, seeds=(0,), first_sequence_id=infos[0].sequence_id)
        rollouts: Any = f"group {index}"
        group = CompletedGroup(request=request, rollouts=rollouts, infos=infos)
        found.append(ScoredGroup(group=group, scores=GroupScores(scores=tuple(one), by_name={}, errors=())))
    return found


class Run:
    def __init__(self, folder: RunFolder, *, apart: bool = False, samples: int = 3, **algorithm: Any) -> None:
        self.config = Config.model_validate(
            {
                "run": {"name": "demo"},
                "policy": {"model": "m"},
                "teacher": {"model": "n"},
                "algorithm": {"name": "on_policy_distillation", **algorithm},
                "data": {"train": "x.jsonl"},
                "rollouts": {"prompts_per_step": 4, "samples_per_prompt": SAMPLES, "temperature": 0.8},
                "train": {"steps": 10, "lr": 1.0, "sequences_per_update": 4, "epochs_per_batch": 2},
                "eval": {"temperature": 0.0},
                "tracking": {"samples_per_step": samples},
                "cluster": {"roles": {"teacher": {"colocate_with": None if apart else "policy"}}},
            }
        )
        self.calls: list[str] = []
        self.student, self.teacher = Student(self.calls), Teacher(self.calls)
        roles: Any = {"policy": self.student, "teacher": self.teacher}
        unused: Any = None
        self.record = RunRecord(
            folder=folder, tracker=unused, timeline=Timeline(folder.timeline), progress=open_progress(10, mode="quiet")
        )
        self.record.begin_step(1)
        self.learning = DistillationLearning(
            self.config, OnlineRoles(**roles, rollout=unused, reward=unused, reference=None, critic=None), self.record
        )

    def learn(self, *scores: Sequence[float]) -> Signals:
        return asyncio.run(self.learning.learn(groups(*scores), 1))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.open(tmp_path, "demo", resume=False) as opened:
        yield opened


def test_of_sampled_tokens_log_probabilities_are_asked_for_once(folder: RunFolder) -> None:
    run = Run(folder)
    signals = run.learn((), (), (), ())
    assert run.student.told == [f"teacher of group {i}" for i in range(4)]
    assert run.student.plan.scores == {}
    assert run.calls.count("updated") == 2 * 2  # two minibatches, two epochs
    assert all("by ()" in call for call in run.calls if call.startswith("update "))
    # three samples are those of two groups
    assert run.teacher.asked == {"rollouts": ["group 0", "group 1"], "temperature": 0.8, "samples_per_prompt": SAMPLES}
    assert signals.teacher_logprobs == {0: -2.0, 1: -3.0, 2: -4.0, 3: -5.0}
    row = run.record.row()
    assert {"time/teacher_s", "time/experience_s", "time/update_s"} <= set(row)


def test_no_sample_is_asked_for_where_none_is_written(folder: RunFolder) -> None:
    run = Run(folder, samples=0)
    assert run.learn((), (), (), ()).teacher_logprobs == {}
    assert run.teacher.asked == {}


def test_rewards_are_not_trained_on_unless_they_weigh_something(folder: RunFolder) -> None:
    run = Run(folder)
    run.learn((0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (0.0, 0.0))
    assert run.student.plan.scores == {}
    run = Run(folder, reward_coef=0.5)
    run.learn((0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (0.0, 0.0))
    # unbiased deviations: 0.7071 and 1.4142, so the advantages of the groups that differ are +- 0.7071, halved
    expected = [-0.35355, 0.35355, 0.0, 0.0, 0.35355, -0.35355, 0.0, 0.0]
    assert [run.student.plan.scores[i] for i in range(8)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_states_are_those_of_the_minibatch_that_is_updated_on(folder: RunFolder, apart: bool) -> None:
    run = Run(folder, apart=apart, divergence="reverse_kl")
    run.learn((), (), (), ())
    assert run.student.told == []
    of = [sorted(i for share in one.sequences_by_rank for i in share) for one in run.student.plan.minibatches]
    updates = [call for call in run.calls if call.startswith("update ")]
    assert [call.split()[1] for call in updates].count("0") == 2
    assert all(call == f"update {call.split()[1]} by states of {of[int(call.split()[1])]}" for call in updates)
    words = [call.split()[0] for call in run.calls]
    if apart:  # the next states are asked for while the student is updated
        assert words == ["teach", *["update", "teach", "updated"] * 3, "update", "updated"]
    else:
        assert words == ["teach", "update", "updated"] * 4


def test_held_out_responses_are_compared_by_the_token(folder: RunFolder) -> None:
    run = Run(folder)
    teacher: Any = run.teacher
    asyncio.run(compare_with_teacher({"heldout": groups((), ())}, run.config, teacher, run.record))
    # tokens 1, 3, 1, 3; gaps -1 - (-2 - i) = 1, 2, 3, 4: (1 + 6 + 3 + 12) / 8
    assert run.record.row()["eval/heldout/kl_teacher"] == 22 / 8
    assert run.teacher.asked["temperature"] == 1.0  # greedy responses have log-probabilities of temperature 1


def test_metrics_and_samples_do_without_scores() -> None:
    row = rollout_metrics(groups((), ()), version=0)
    assert not [key for key in row if key.startswith("rewards/")]
    (first, _), _ = (one.records for one in group_samples(groups((), ()), Signals(), split="train", most=None))
    assert (first.score, first.scores, first.mean_teacher_logprob) == (None, {}, None)
