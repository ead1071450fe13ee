"""An engine holds requests back in order. A refused or missing request ends the wait."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.held_requests import HeldRequests
from rlhf.errors import RunError


def entrance(steps: list[list[str]], deadline_s: float = 30.0) -> HeldRequests:
    """Return the entrance of an engine that records the samples of each step in `steps`."""

    def submit(samples: list[str]) -> list[Future[Any]]:
        steps.append(list(samples))
        return [Future() for _ in samples]

    async def within(started: asyncio.Future[Any], _: str) -> Any:
        return await started

    loop = SimpleNamespace(name="engine", submit=submit)
    calls: Any = SimpleNamespace(loop=loop, within=within, deadline_s=deadline_s)
    return HeldRequests(calls)


def outcomes(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_held_groups_start_in_one_step_by_group_id() -> None:
    steps: list[list[str]] = []
    held = entrance(steps)
    held.hold()
    outcomes(held.admit(7, ["e", "f"]), held.release(3), held.admit(3, ["a", "b"]), held.admit(5, ["c"]))
    assert steps == [["a", "b", "c", "e", "f"]]
    outcomes(held.admit(9, ["g"]))
    assert steps[1:] == [["g"]]


@pytest.mark.parametrize("late", [False, True], ids=["before release", "after release"])
def test_a_refused_group_fails_the_others_whenever_they_arrive(late: bool) -> None:
    steps: list[list[str]] = []
    held = entrance(steps)
    held.hold()
    held.refuse(1, ValueError("no such token"))
    calls = [held.admit(2, ["a"]), held.release(2)]
    results = outcomes(*(calls[::-1] if late else calls))
    errors = [str(result) for result in results if isinstance(result, RunError)]
    assert errors == ["engine: group 1: no such token"] * 2
    assert steps == []
    outcomes(held.admit(3, ["b"]))
    assert steps == [["b"]]


def test_a_missing_group_ends_the_wait_at_the_deadline() -> None:
    held = entrance([], deadline_s=0.05)
    held.hold()
    errors = outcomes(held.admit(1, ["a"]), held.release(2))
    assert [str(error) for error in errors] == ["engine: only 1 of 2 groups arrived within 0 s"] * 2
