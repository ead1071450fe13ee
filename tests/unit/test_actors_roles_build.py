"""A run creates groups of workers. The actors only record their class; tests/integration starts real workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.roles import build, worker_pools
from actors.roles.build import RunContext, build_roles
from actors.roles.group import Stoppable
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from tests.integration.recipes import write_config

REWARDS = {"rewards": {"correct": {"function": "last_number"}}}
OFFLINE = {
    "data": {"train": {"split": "sft"}, "max_prompt_tokens": None, "eval": None},
    "eval": None,
    "rollouts": None,
    "rewards": None,
}
LONGEST = 64
TEACHER = {"teacher": {"model": "tiny:llama"}}


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The role and the worker's class of each group, in order."""
    created: list[tuple[str, str]] = []

    def spawn(
        cluster: Any, placement: Any, role: str, worker: type, *_: Any, longest_sequence: int, **__: Any
    ) -> tuple[list[Any], None]:
        assert longest_sequence == LONGEST  # over all roles, so that all models choose the same RoPE frequencies
        created.append((role, worker.__name__))
        return [SimpleNamespace()], None

    monkeypatch.setattr(build, "spawn", spawn)
    monkeypatch.setattr(build, "MemoryFolders", SimpleNamespace)
    monkeypatch.setattr(worker_pools, "spawn", spawn)
    return created


def run(folder: Path, algorithm: dict[str, Any], sections: dict[str, Any]) -> RunContext:
    path = write_config(folder / "run.yaml", {"run": {"name": "demo"}, "algorithm": algorithm, **sections})
    placement: Any = SimpleNamespace(on_one_host=lambda: True)
    return RunContext(config=cast(Config, load(path).stages["demo"]), placement=placement, longest_sequence=LONGEST)


@pytest.mark.parametrize(
    ("algorithm", "sections", "expected"),
    [
        (
            {"name": "ppo", "kl": {"coef": 0.1}},
            REWARDS,
            {
                "policy": "PolicyRank",
                "critic": "CriticWorker",
                "reference": "ReferenceWorker",
                "reward": "RewardWorker",
            },
        ),
        ({"name": "grpo", "kl": {"coef": 0.0}}, REWARDS, {"policy": "PolicyRank", "reward": "RewardWorker"}),
        (
            {"name": "on_policy_distillation"},
            TEACHER,
            {"policy": "StudentRank", "teacher": "OnlineTeacherWorker", "reward": "RewardWorker"},
        ),
        ({"name": "sft"}, OFFLINE, {"policy": "SupervisedWorker"}),
        ({"name": "distillation"}, OFFLINE | TEACHER, {"policy": "DistillationWorker", "teacher": "TeacherWorker"}),
    ],
    ids=["ppo", "grpo", "on_policy_distillation", "sft", "distillation"],
)
def test_the_algorithm_determines_the_groups(
    created: list[tuple[str, str]], tmp_path: Path, algorithm: Any, sections: Any, expected: dict[str, str]
) -> None:
    groups: list[Stoppable] = []
    roles = build_roles(run(tmp_path, algorithm, sections), groups)
    assert created == list(expected.items())
    assert list(roles) == list(expected)
    assert groups[:-1] == list(roles.values())  # before the folders of the snapshots


def test_groups_made_before_a_failure_are_known(created: list[tuple[str, str]], tmp_path: Path) -> None:
    """Groups created before a failure can still be ended."""
    context = run(tmp_path, {"name": "grpo", "kl": {"coef": 0.0}}, REWARDS)
    groups: list[Stoppable] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pools, "spawn", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_roles(context, groups)
    assert [type(group).__name__ for group in groups] == ["PolicyGang", "SimpleNamespace"]
