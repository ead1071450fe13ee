"""Calls waiting at the same time go together, and each gets its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from actors.roles.collecting import WaitingCalls


async def all_of(collector: WaitingCalls[int, int], calls: Sequence[int]) -> list[Any]:
    return await asyncio.gather(*map(collector.call, calls), return_exceptions=True)


def work(carry_out: Callable[[Sequence[int]], Awaitable[Sequence[Any]]], calls: Sequence[int]) -> list[Any]:
    async def run() -> list[Any]:
        return await asyncio.wait_for(all_of(WaitingCalls(carry_out, fits=lambda some: sum(some) <= 10), calls), 10.0)

    return asyncio.run(run())


def test_calls_go_together_within_the_limit_and_a_large_call_goes_alone() -> None:
    passes: list[list[int]] = []

    async def carry_out(calls: Sequence[int]) -> list[int]:
        passes.append(list(calls))
        await asyncio.sleep(0.0)
        return [10 * call for call in calls]

    assert work(carry_out, [4, 7, 5, 30, 1, 3]) == [40, 70, 50, 300, 10, 30]
    assert passes == [[4, 5, 1], [7, 3], [30]]


def test_an_error_of_a_call_is_of_this_call_and_an_error_of_the_pass_of_all() -> None:
    async def carry_out(calls: Sequence[int]) -> list[int | Exception]:
        if 9 in calls:
            raise OSError("lost")
        return [ValueError("bad") if call == 2 else call for call in calls]

    one, two, three = work(carry_out, [1, 2, 3])
    assert (one, three) == (1, 3)
    assert isinstance(two, ValueError)
    lost, also_lost, later = work(carry_out, [9, 1, 4])
    assert isinstance(lost, OSError)
    assert isinstance(also_lost, OSError)
    assert later == 4


def test_later_calls_wait_for_the_running_pass_and_a_caller_may_go_away() -> None:
    passes: list[list[int]] = []
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def carry_out(calls: Sequence[int]) -> list[int]:
        passes.append(list(calls))
        begun.set()
        await goes_on.wait()
        return list(calls)

    async def run() -> list[Any]:
        collector = WaitingCalls(carry_out, fits=lambda some: True)
        first = asyncio.create_task(collector.call(1))
        await asyncio.wait_for(begun.wait(), 10.0)
        later = asyncio.create_task(all_of(collector, [2, 3]))
        await asyncio.sleep(0.0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        goes_on.set()
        return await asyncio.wait_for(later, 10.0)

    assert asyncio.run(run()) == [2, 3]
    assert passes == [[1], [2, 3]]
