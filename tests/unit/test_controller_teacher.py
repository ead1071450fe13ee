"""When a teacher is asked, and where the data stand meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.controller.offline import OfflineController
from rlhf.controller.supervisor import Supervisor
from rlhf.data.examples import Example
from rlhf.data.stream import Stream
from rlhf.types import MinibatchPlan
from tests.fakes.configs import offline_config

ROWS = tuple(Example(example_id=i, token_ids=(1, 2), loss_mask=(False, True)) for i in range(5))


class Student:
    """A student with a slow update that records the rows and states of each call."""

    num_ranks = 1

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def update_on(self, plan: MinibatchPlan, states: Any, *, snapshot: int | None) -> dict[str, Any]:
        self.calls.append(f"update {plan.sequences_by_rank[0]} by {states}")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.calls.append("updated")
        return {}


class Teacher:
    """A teacher that records requests."""

    role = "teacher"

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def states(self, dataset: int, plan: MinibatchPlan) -> str:
        rows = plan.sequences_by_rank[0]
        self.calls.append(f"teach {rows}")
        return f"states of {rows}"


@contextmanager
def stage(name: str, *, role: str = "controller") -> Iterator[None]:
    yield


@contextmanager
def apart(parts: list[Any], *, is_shown: bool = False) -> Iterator[None]:
    yield


def three_steps(*, colocate_with: str | None) -> tuple[list[str], list[int]]:
    """Return the calls in order, and the position of the cursor after each step."""
    config = offline_config(
        teacher={"model": "n"},
        algorithm={"name": "distillation"},
        cluster={"roles": {"teacher": {"colocate_with": colocate_with}}, "restarts": {"gang": 0}},
    )
    calls: list[str] = []
    parts: Any = {"role": Student(calls), "record": SimpleNamespace(stage=stage, apart=apart, add=lambda metrics: None)}
    stream = Stream(ROWS, seed=0, shuffle=False)
    teacher: Any = Teacher(calls)
    controller = OfflineController(
        config,
        **parts,
        train_set=ROWS,
        rows=stream,
        eval_sets={},
        policy_fingerprint="",
        supervisor=Supervisor(config.cluster.restarts, parts["record"], ()),
        teacher=teacher,
    )
    positions = []
    for step in range(3):
        asyncio.run(controller.train_step(step + 1))
        cursor = controller.state()["cursor"]
        positions.append(5 * cursor["epoch"] + cursor["position"])
    return calls, positions


@pytest.mark.parametrize("colocate_with", ["policy", None])
def test_each_step_has_its_own_rows_and_the_cursor_stands_behind_them(colocate_with: str | None) -> None:
    calls, positions = three_steps(colocate_with=colocate_with)
    assert [call for call in calls if call.startswith("update ")] == [
        "update (0, 1) by states of (0, 1)",
        "update (2, 3) by states of (2, 3)",
        "update (4, 0) by states of (4, 0)",
    ]
    assert positions == [2, 4, 6]


def test_a_teacher_beside_the_student_waits_for_it_and_another_is_a_step_ahead() -> None:
    def short(calls: list[str]) -> list[str]:
        return [" ".join(call.split()[:3]) if call.startswith("update ") else call for call in calls]

    assert short(three_steps(colocate_with="policy")[0]) == [
        *("teach (0, 1)", "update (0, 1)", "updated"),
        *("teach (2, 3)", "update (2, 3)", "updated"),
        *("teach (4, 0)", "update (4, 0)", "updated"),
    ]
    assert short(three_steps(colocate_with=None)[0]) == [
        *("teach (0, 1)", "update (0, 1)", "teach (2, 3)", "updated"),
        *("update (2, 3)", "teach (4, 0)", "updated"),
        *("update (4, 0)", "updated"),
    ]
