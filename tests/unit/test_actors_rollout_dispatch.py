"""Groups go to the engine with the fewest outstanding tokens. While all engines are full, groups wait outside."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.rollout.dispatch import Dispatch, EngineCapacity, GroupWork, Slot, shares
from tests.fakes.calls import settle


def work(*, prompt: int = 10, samples: int = 2, limit: int = 20) -> GroupWork:
    return GroupWork(prompt_tokens=prompt, samples=samples, limit=limit)


def dispatch(engines: int, *, tokens: int = 1000, samples: int = 100) -> Dispatch:
    rules = Dispatch()
    for engine in range(engines):
        rules.open(engine, EngineCapacity(cache_tokens=tokens, samples=samples))
    return rules


async def entered(rules: Dispatch, group_id: int, size: GroupWork | None = None) -> Slot:
    slot = await asyncio.wait_for(rules.enter(group_id, size or work(), urgent=False), 5.0)
    assert slot is not None
    return slot


async def waiter(rules: Dispatch, group_id: int, *, urgent: bool = False) -> asyncio.Task[Any]:
    task = asyncio.create_task(rules.enter(group_id, work(), urgent=urgent))
    await settle()
    return task


async def test_work_is_counted_in_tokens_and_not_in_groups() -> None:
    rules = dispatch(2)
    assert (await entered(rules, 0, work(prompt=500))).engine == 0
    small = [await entered(rules, group_id) for group_id in range(1, 10)]
    assert [slot.engine for slot in small] == [1] * 9


async def test_a_response_is_expected_to_be_as_long_as_the_recent_ones() -> None:
    rules = dispatch(1)
    first = await entered(rules, 0, work(limit=100))
    assert first.tokens == 10 + 2 * 100
    rules.leave(first, [4, 8])
    assert (await entered(rules, 1, work(limit=100))).tokens == 10 + 2 * 6
    assert (await entered(rules, 2, work(limit=3))).tokens == 10 + 2 * 3


async def test_groups_wait_for_an_engine_with_room_in_order_and_urgent_ones_first() -> None:
    rules = dispatch(2, samples=2)
    slots = [await entered(rules, group_id) for group_id in (0, 1)]
    late, later, urgent = await waiter(rules, 2), await waiter(rules, 3), await waiter(rules, 4, urgent=True)
    assert [late.done(), later.done(), urgent.done()] == [False, False, False]
    rules.leave(slots[1])
    await settle()
    assert [late.done(), later.done(), urgent.done()] == [False, False, True]
    assert urgent.result().engine == 1
    rules.leave(slots[0])
    rules.leave(urgent.result())
    assert [(await late).engine, (await later).engine] == [0, 1]


async def test_the_cache_limits_an_engine_too_but_an_idle_one_takes_any_group() -> None:
    rules = dispatch(1, tokens=60)
    huge = await entered(rules, 0, work(prompt=500))
    waiting = await waiter(rules, 1)
    assert not waiting.done()
    rules.leave(huge)
    assert await waiting == Slot(engine=0, tokens=50, samples=2)


async def test_a_dropped_group_does_not_hold_up_those_behind_it() -> None:
    rules = dispatch(1, samples=2)
    slot = await entered(rules, 0)
    dropped, given_up, behind, last = [await waiter(rules, group_id) for group_id in (1, 2, 3, 4)]
    rules.drop(1)
    given_up.cancel()
    assert await dropped is None
    rules.leave(slot)  # `behind` now has the room, and gives up before its task knows
    behind.cancel()
    assert (await last).engine == 0


def test_shares_of_a_batch_are_balanced_by_tokens() -> None:
    works = [work(limit=100), *[work(limit=20)] * 4]
    assert shares(works, 2) == [[0], [1, 2, 3, 4]]
    assert shares([work()] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert shares(works, 1) == [[0, 1, 2, 3, 4]]


async def test_an_engine_is_quiet_since_its_last_group_or_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("actors.rollout.dispatch.running_s", lambda: now)
    rules = dispatch(1)
    first = await entered(rules, 0)
    now = 110.0
    await entered(rules, 1)  # no progress
    assert rules.quiet_s(0) == 10.0
    rules.leave(first)
    now = 113.0
    assert rules.quiet_s(0) == 3.0


async def test_a_closed_engine_gets_no_group_until_it_is_open_again() -> None:
    rules = dispatch(2, samples=2)
    lost, other = [await entered(rules, group_id) for group_id in (0, 1)]
    waiting = await waiter(rules, 2)
    rules.close(lost.engine)
    rules.leave(lost)
    await settle()
    assert not waiting.done(), "not even an idle engine takes a group while it is closed"
    rules.leave(other)
    assert (await waiting) == other
    behind, joining = await waiter(rules, 3), await waiter(rules, 4)
    rules.open(lost.engine, EngineCapacity(cache_tokens=1000, samples=2))
    assert (await behind) == lost
    rules.close(7)  # this engine was never open before, and joins
    rules.open(7, EngineCapacity(cache_tokens=1000, samples=2))
    assert (await joining).engine == 7


async def test_an_engine_that_is_lost_for_good_fails_all_groups_that_wait() -> None:
    rules = dispatch(1, samples=2)
    await entered(rules, 0)
    waiting, given_up = await waiter(rules, 1), await waiter(rules, 2)
    rules.fail(ValueError("no successor"))
    given_up.cancel()
    with pytest.raises(ValueError, match="no successor"):
        await waiting
    with pytest.raises(ValueError, match="no successor"):
        await rules.enter(3, work(), urgent=True)
    with pytest.raises(asyncio.CancelledError):
        await given_up
