"""Engines join and leave, and groups go to present engines. Actors and room are fakes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.cluster.placement import NoRoom
from actors.rollout import elastic_engines
from actors.rollout.elastic_engines import ElasticEngines
from rlhf.config.derive import WeightSync
from rlhf.config.schema.cluster import EngineRange
from rlhf.errors import Preempted, RunError, UserError, WorkerLost
from tests.fakes.engine_handles import DEADLINE_S, Engine, Engines, Policy, asked, synced, until


class Room:
    """Seats in a cluster. A test gives and takes room."""

    def __init__(self, engines: EngineRange, free: int = 0) -> None:
        self.engines = engines
        self.free = free
        self.changed = asyncio.Event()
        self.taken: dict[int, str] = {rank: f"node {rank}" for rank in range(engines.min)}
        self.limits: list[float | None] = []

    def give(self, rooms: int = 1) -> None:
        self.free += rooms
        self.changed.set()

    def give_back(self, rank: int) -> None:
        if self.taken.pop(rank, None) is not None:
            self.give()

    def nodes(self) -> dict[int, str]:
        return dict(self.taken)

    async def take(self, rank: int, *, limit_s: float | None) -> None:
        self.limits.append(limit_s)
        self.taken.pop(rank, None)
        while not self.free:
            if limit_s is not None:
                raise NoRoom("placement: no room")
            self.changed.clear()
            await self.changed.wait()
        self.free -= 1
        self.taken[rank] = f"new node {rank}"


class FailedStart(Engine):
    """An engine that cannot start."""

    def __init__(self, error: Exception) -> None:
        super().__init__("failed")
        self.error = error


class Elastic(Engines):
    """Elastic engines. Each started engine comes from the list of successors."""

    _restart = ElasticEngines._restart

    async def _start_one(self, rank: int, *, ends: float) -> None:
        engine = self.successors.pop(0)
        self.handles[rank] = cast(Any, engine)
        if isinstance(engine, FailedStart):
            raise engine.error

    @property
    def room(self) -> Room:
        return cast(Any, self.seats)


async def elastic(*first: Engine, most: int, new: tuple[Engine, ...] = (), policy: Policy | None = None) -> Elastic:
    """Return engines with the first weights, by broadcast for a policy."""
    engines = Elastic(*first, successors=new)
    engines.placement = cast(Any, SimpleNamespace(seats=Room(EngineRange(min=1, max=most))))
    engines.start_deadline_s = DEADLINE_S

    async def end_one(rank: int) -> None:
        cast(Any, engines.handles[rank]).die()

    engines.processes = cast(Any, SimpleNamespace(end_one=end_one, end=lambda: None, ended=False))
    if policy is None:
        engines.grow()
    else:
        engines.sync = WeightSync(method="gloo", why="")
        await engines.connect(cast(Any, policy), adapter=None)
    await synced(engines)
    return engines


async def ended(engines: Elastic) -> None:
    """End the engines, and assert that no task goes on."""
    await engines.give_up_rebuilds()
    assert all(task.done() for task in engines._rebuilds.values())


async def joined(*new: Engine) -> tuple[Elastic, Engine]:
    """Return two elastic engines after the second has joined, and the first. `new`: the joining engines in order."""
    engines = await elastic(first := Engine("first"), most=2, new=new)
    engines.room.give()
    await until(lambda: engines.num_working == 2)
    return engines, first


async def test_an_engine_joins_when_there_is_room_and_gets_groups_that_wait() -> None:
    first, second = Engine("first"), Engine("second")
    engines = await elastic(first, most=3, new=(second,))
    await asyncio.wait_for(synced(engines, 2), DEADLINE_S)  # the sync does not wait for an engine that may never join
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: 0 in first.groups)
    assert engines.num_working == 1
    engines.room.give()
    await until(lambda: 1 in second.groups)
    assert second.calls == ["open", "load 2", "probe", 1]
    assert engines.num_working == 2
    assert engines.room.limits == [None, None], "both ranks wait for room without a limit"
    first.finish(0)
    second.finish(1)
    assert all(await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S))
    await ended(engines)


async def test_an_engine_of_a_drained_node_leaves_and_its_groups_are_asked_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    going: dict[str, float | None] | None = {}

    async def draining_nodes() -> dict[str, float | None]:
        if going is None:
            raise RuntimeError("no answer of the head")
        return going

    monkeypatch.setattr(elastic_engines, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(elastic_engines, "draining_nodes", draining_nodes)
    engines, first = await joined(second := Engine("second"), third := Engine("third"))
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: first.groups and second.groups)
    first.finish(0)
    assert await tasks[0] is not None
    going["node 0"] = None
    await until(lambda: 1 in second.groups and engines.num_working == 1)
    await until(lambda: first.is_dead)
    second.finish(1)
    assert await asyncio.wait_for(tasks[1], DEADLINE_S) is not None
    assert engines.supervisor is not None
    assert engines.supervisor.metrics()["recovery/rollout/total"].result() == 0, "it was not lost"
    engines.room.give()
    await until(lambda: engines.num_working == 2)
    assert "probe" in third.calls
    going = None
    await until(lambda: "engines no longer leave nodes that are drained" in caplog.text)
    assert "no answer of the head" in caplog.text
    await ended(engines)


async def test_a_lost_engine_without_room_is_gone_and_joins_again_when_there_is_room() -> None:
    engines, first = await joined(second := Engine("second"), again := Engine("again"))
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: first.groups and second.groups)
    second.die()
    first.finish(0)
    await until(lambda: 1 in first.groups)
    await until(lambda: engines.room.limits[-2:] == [DEADLINE_S, None])
    assert engines.num_working == 1
    first.finish(1)
    assert all(await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S))
    engines.room.give()
    await until(lambda: engines.num_working == 2)
    assert "probe" in again.calls
    await ended(engines)


TOO_FEW = "placement: no room\n0 engines are left, fewer than cluster.roles.rollout.engines.min: 1"


@pytest.mark.parametrize(("how", "before"), [("dies", "successor could not be started: "), ("leaves", "^")])
async def test_a_run_with_fewer_engines_than_the_smallest_number_is_preempted(how: str, before: str) -> None:
    engines = await elastic(first := Engine("first"), most=2)
    task = asked(engines, 0)
    await until(lambda: first.groups)
    if how == "dies":
        first.die()
    else:
        engines._leave(0)
    with pytest.raises(Preempted, match=f"{before}{TOO_FEW}"):
        await asyncio.wait_for(task, DEADLINE_S)
    await ended(engines)


async def test_an_engine_that_is_lost_while_it_joins_is_started_again() -> None:
    dead, second = Engine("dead"), Engine("second")
    dead.is_dead = True
    engines = await elastic(Engine("first"), most=2, new=(dead, second))
    engines.room.give(2)
    await until(lambda: engines.num_working == 2)
    assert second.calls == ["open", "load 1", "probe"]
    await ended(engines)


LOST = WorkerLost("rollout rank 1 died.", role="rollout", rank=1, stage="start", kind="out_of_memory")


@pytest.mark.parametrize("error", [RunError("vLLM did not start"), UserError("no folder /models/m"), LOST])
async def test_the_run_goes_on_without_an_engine_that_cannot_join_and_starts_it_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(elastic_engines, "START_AGAIN_AFTER_S", 0.001)
    failed, second = [FailedStart(error) for _ in range(3)], Engine("second")
    engines, _ = await joined(*failed, second)
    assert second.calls == ["open", "load 1", "probe"]
    warnings = [record.message for record in caplog.records if "cannot start" in record.message]
    assert len(warnings) == 3
    assert all("continues with 1 engines" in text and str(error).split(" The run")[0] in text for text in warnings)
    assert all(engine.is_dead for engine in failed)
    assert engines.room.limits == [None] * 4
    await ended(engines)


@pytest.mark.parametrize("least", [1, 2])
async def test_a_successor_that_cannot_start_ends_the_run_only_if_too_few_engines_are_left(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic_engines, "START_AGAIN_AFTER_S", 0.001)
    first, second, third = Engine("first"), Engine("second"), Engine("third")
    engines = await elastic(first, second, most=2, new=(FailedStart(RunError("vLLM did not start")), third))
    engines.room.engines = EngineRange(min=least, max=2)
    engines.room.give()
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: first.groups and second.groups)
    first.finish(0)
    second.die()
    if least == 2:
        await until(lambda: 1 in engines._rebuilds)
        with pytest.raises(RunError, match="successor could not be started: vLLM did not start"):
            await engines.working(1)
    else:
        await until(lambda: 1 in first.groups and engines.num_working == 2)
        assert third.calls == ["open", "load 1", "probe"]
    for task in tasks:
        task.cancel()
    await ended(engines)


async def test_an_engine_joins_a_broadcast_and_leaves_it() -> None:
    policy, first, second = Policy(), Engine("first"), Engine("second")
    engines = await elastic(first, most=2, new=(second,), policy=policy)
    engines.room.give()
    await until(lambda: engines._unsynced)
    assert engines.num_working == 1
    await synced(engines, 2)
    await until(lambda: engines.num_working == 2)
    engines._leave(0)
    assert engines.num_working == 1
    engines._leave(1)
    assert engines.num_working == 1, "the last engine stays"
    await synced(engines, 3)
    assert policy.meetings == [1, 2, 1]
    await ended(engines)
