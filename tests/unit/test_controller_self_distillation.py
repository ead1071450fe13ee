"""Self-distillation in the controller: contexts of responses, the plan of a step, and the metrics."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from rlhf.algorithms.sdpo import SDPOConfig
from rlhf.algorithms.self_distillation import SelfDistillationConfig
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.privileged import contexts_of
from rlhf.controller.self_distillation_learning import SelfDistillationLearning
from rlhf.roles import ScoredGroup
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.types import PrivilegedContext
from tests.fakes.configs import online_config
from tests.fakes.groups import scored_groups
from tests.fakes.records import quiet_record
from tests.fakes.roles import FakePolicy, FakeRewards


def section(template: str, **keys: Any) -> SelfDistillationConfig:
    return SDPOConfig.model_validate({"name": "sdpo", "privileged": {"template": template, **keys}})


def with_feedback(scored: ScoredGroup, *texts: str | None) -> ScoredGroup:
    return replace(scored, scores=replace(scored.scores, feedback=texts))


def test_a_better_response_is_the_first_other_success() -> None:
    (scored,) = scored_groups([0.0, 1.0, 2.0])
    found = contexts_of(scored, section("{prompt}\n\n{better_response}"))
    assert found == {i: PrivilegedContext(better=better) for i, better in ((0, 1), (1, 2), (2, 1))}
    lone = contexts_of(scored, section("{prompt}\n\n{better_response}", success_score=2.0))
    assert lone == {0: PrivilegedContext(better=2), 1: PrivilegedContext(better=2)}  # the success itself has none


def test_feedback_and_columns_give_a_teacher_too() -> None:
    (scored,) = scored_groups([0.0, 0.5])
    told = with_feedback(scored, None, "off by one")
    assert contexts_of(told, section("{prompt}\n\n{feedback}")) == {1: PrivilegedContext(feedback="off by one")}
    everyone = contexts_of(told, section("{prompt} {answer}\n\n{feedback}"))
    assert everyone == {0: PrivilegedContext(), 1: PrivilegedContext(feedback="off by one")}
    assert contexts_of(scored, section("{prompt}\n\n{feedback}")) == {}
    assert contexts_of(told, section("{prompt} {answer}")) == {0: PrivilegedContext(), 1: PrivilegedContext()}


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{solution}", "has {prompt} 0 times"),
        ("{prompt}{prompt}{x}", "has {prompt} 2 times"),
        ("{prompt}", "has no field besides {prompt}"),
        ("{prompt} {x!r}", "expected a column's name and nothing else"),
        ("{prompt} {0}", "expected a column's name and nothing else"),
        ("{prompt} {feedback}", "has {prompt} in a paragraph that may be left out"),
    ],
)
def test_a_wrong_template_is_refused(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("{", r"\{").replace("}", r"\}")):
        section(template)


def test_a_section_without_a_template_keeps_that_of_the_algorithm() -> None:
    written = SDPOConfig.model_validate({"name": "sdpo", "privileged": {"success_score": 0.5}})
    default = SDPOConfig(name="sdpo")
    assert written.privileged.template == default.privileged.template
    assert (written.privileged.success_score, default.privileged.success_score) == (0.5, 1.0)


class Run:
    def __init__(self, folder: RunFolder, **algorithm: Any) -> None:
        self.config = online_config(
            algorithm={"name": "sdpo", "privileged": {"template": "{prompt}\n\n{better_response}"}, **algorithm},
            rollouts={"samples_per_prompt": 3},
            train={"sequences_per_update": 6},
        )
        self.calls: list[str] = []
        self.policy, self.rewards = FakePolicy(self.calls, reports=False), FakeRewards()
        self.record, unused = quiet_record(folder), cast(Any, None)
        self.record.begin_step(1)
        roles: Any = {"policy": self.policy, "reward": self.rewards, "rollout": unused}
        self.learning = SelfDistillationLearning(self.config, OnlineRoles(**roles), self.record)

    def learn(self, *scores: list[float]) -> Signals:
        return asyncio.run(self.learning.learn(scored_groups(*scores), 1))


def test_only_taught_responses_are_planned(folder: RunFolder) -> None:
    run = Run(folder, reward_coef=0.5)
    signals = run.learn([0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.5])
    planned = [i for one in run.policy.plan.minibatches for share in one.sequences_by_rank for i in share]
    assert set(planned) == {0, 2, 6, 7, 8} == signals.trained
    assert run.rewards.privileged == {
        0: {0: PrivilegedContext(better=1), 2: PrivilegedContext(better=1)},
        2: {6: PrivilegedContext(better=7), 7: PrivilegedContext(better=6), 8: PrivilegedContext(better=6)},
    }
    assert len(signals.privileged) == 2
    assert run.record.row()["experience/privileged/fraction"] == 5 / 12
    # compared with the whole group: (0 - 1/3) / 0.57735, halved
    assert run.policy.plan.scores == pytest.approx({0: -0.28867, 2: -0.28867, 6: 0.0, 7: 0.0, 8: 0.0}, abs=1e-4)


def test_a_run_without_rewards_learns_from_a_column(folder: RunFolder) -> None:
    run = Run(folder, privileged={"template": "{prompt} {answer}"})
    signals = asyncio.run(run.learning.learn(scored_groups((), (), samples=3), 1))
    assert signals.trained == frozenset(range(6))
    assert run.policy.plan.scores == {}


def test_a_step_without_a_taught_response_updates_nothing(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(folder)
    assert run.learn([0.0, 0.0, 0.0], [0.0, 0.5, 0.0]).trained == frozenset()
    assert run.calls == []
    assert "no response has a better response or feedback" in caplog.text
    assert run.record.row()["experience/privileged/fraction"] == 0.0
