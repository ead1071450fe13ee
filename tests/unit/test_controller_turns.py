"""Whose turn it is on a shared GPU: in which order engines and trained roles leave it and come back."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.controller.learning import OnlineRoles
from rlhf.controller.online import OnlineController

ASIDE = ["policy leaves", "critic leaves"]
BACK = ["policy comes back", "critic comes back"]


class Trained:
    """Notes when it leaves the GPU and comes back."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    async def offload(self) -> None:
        self.calls.append(f"{self.name} leaves")

    async def reload(self) -> None:
        self.calls.append(f"{self.name} comes back")


class Engines:
    """Notes when they sleep and what of them wakes."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def sleep(self, *, keep_weights: bool) -> None:
        self.calls.append("sleep with weights" if keep_weights else "sleep")

    async def wake(self, part: str) -> None:
        self.calls.append(f"{part} wakes")


def take_turns(*, shared: bool, critic_beside: bool) -> list[str]:
    """What is called as the trained roles get the GPUs, keeping the engines' weights, and the engines get them back."""
    calls: list[str] = []
    roles: Any = {"policy": Trained("policy", calls), "critic": Trained("critic", calls), "rollout": Engines(calls)}
    controller = OnlineController.__new__(OnlineController)
    controller.takes_turns = shared
    controller.roles = OnlineRoles(**roles, reward=None, reference=None)
    critic = SimpleNamespace(colocate_with="policy" if critic_beside else None)
    controller.config = SimpleNamespace(cluster=SimpleNamespace(roles=SimpleNamespace(critic=critic)))  # type: ignore[assignment]

    async def turns() -> None:
        await controller._to_trainers(keep_weights=True)
        await controller._to_engines()

    asyncio.run(turns())
    return calls


def test_engines_sleep_before_states_come_back_and_their_cache_wakes_after_they_have_left() -> None:
    found = take_turns(shared=True, critic_beside=True)
    assert found == ["sleep with weights", *BACK, *ASIDE, "cache wakes"]


def test_a_critic_on_gpus_of_its_own_stays_there() -> None:
    found = take_turns(shared=True, critic_beside=False)
    assert found == ["sleep with weights", "policy comes back", "policy leaves", "cache wakes"]


@pytest.mark.parametrize(
    ("shared", "beside", "called"),
    [(True, True, ["sleep with weights", "weights wakes", "cache wakes"]), (True, False, []), (False, True, [])],
)
def test_engines_sleep_while_a_teacher_on_their_gpus_computes(shared: bool, beside: bool, called: list[str]) -> None:
    calls: list[str] = []
    roles: Any = {"policy": None, "rollout": Engines(calls), "teacher": None}
    controller = OnlineController.__new__(OnlineController)
    controller.takes_turns = shared
    controller.roles = OnlineRoles(**roles, reward=roles["policy"], reference=None, critic=None)
    teacher = SimpleNamespace(colocate_with="policy" if beside else None)
    sections: Any = SimpleNamespace(cluster=SimpleNamespace(roles=SimpleNamespace(teacher=teacher)), eval=None)
    controller.config = sections
    record: Any = SimpleNamespace(stage=lambda *_, **__: nullcontext())
    controller.record = record
    nobody: Any = None
    asyncio.run(controller._compare({}, nobody))
    assert calls == called


@pytest.mark.parametrize("critic_beside", [True, False])
def test_without_a_shared_gpu_nobody_moves(critic_beside: bool) -> None:
    assert take_turns(shared=False, critic_beside=critic_beside) == []
