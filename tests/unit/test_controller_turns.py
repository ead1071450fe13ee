"""Engines and trained roles leave a shared GPU and return in the right order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlhf.controller.learning import OnlineRoles
from rlhf.controller.online import OnlineController
from tests.fakes.roles import FakeEngines, FakePolicy, FakeReference, FakeTeacher, FakeTrained


def controller_of(calls: list[str], sharing: set[str]) -> OnlineController:
    """Return a controller for calls of turns only."""
    critic = FakeTrained(calls)
    critic.name = "critic"
    members = (FakePolicy(calls), critic, FakeReference(calls), FakeTeacher(calls))
    roles: Any = {member.name: member for member in members}
    controller = OnlineController.__new__(OnlineController)
    controller.roles = OnlineRoles(**roles, rollout=FakeEngines(calls), reward=roles["policy"])
    controller.sharing = frozenset(sharing)  # type: ignore[arg-type]
    return controller


def run_turns(sharing: set[str]) -> list[str]:
    """Return the calls of a training turn and the following weight transfer."""
    calls: list[str] = []
    controller = controller_of(calls, sharing)

    async def turns() -> None:
        await controller._to_trainers("policy", "critic", "reference", "teacher", keep_weights=False)
        await controller._to_engines()

    asyncio.run(turns())
    return calls


def test_engines_sleep_before_states_come_back_and_their_cache_wakes_after_the_policy_has_left() -> None:
    back = ["policy comes back", "critic comes back", "reference comes back", "teacher comes back"]
    everyone = {"policy", "critic", "reference", "teacher"}
    assert run_turns(everyone) == ["sleep", *back, "policy leaves", "cache wakes"]


def test_roles_on_other_gpus_stay_there() -> None:
    assert run_turns({"policy"}) == ["sleep", "policy comes back", "policy leaves", "cache wakes"]


def test_without_a_shared_gpu_nobody_moves() -> None:
    assert run_turns(set()) == []


@pytest.mark.parametrize("name", ["policy", "teacher"])
def test_a_turn_of_trainers_wakes_the_engines_after_they_have_left(name: str) -> None:
    calls: list[str] = []
    controller = controller_of(calls, {"policy", "teacher"})

    async def turn() -> None:
        async with controller._trainers_turn(name):  # type: ignore[arg-type]
            calls.append("work")

    asyncio.run(turn())
    back, leaves = f"{name} comes back", f"{name} leaves"
    assert calls == ["sleep with weights", back, "work", leaves, "weights wakes", "cache wakes"]


def test_engines_stay_awake_during_the_turn_of_a_teacher_on_other_gpus() -> None:
    calls: list[str] = []
    controller = controller_of(calls, {"policy"})

    async def turn() -> None:
        async with controller._trainers_turn("teacher"):
            calls.append("work")

    asyncio.run(turn())
    assert calls == ["work"]
