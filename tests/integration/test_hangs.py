"""Hanging processes in real Ray actors are named with stacks, killed and replaced."""

from __future__ import annotations

import asyncio
import ctypes
from typing import Any

import psutil
import pytest
import ray

from actors.cluster import watch
from actors.cluster.actor_locations import locations
from actors.cluster.watch import watching
from actors.roles.group import WorkerGroup
from rlhf.errors import WorkerLost


class Sleepers(WorkerGroup):
    role = "reward"


def sleeper() -> Any:
    """Create a worker that can sleep without letting other threads run."""

    class Sleeper:
        def start(self) -> None: ...

        def sleep_and_hold(self, seconds: int) -> None:
            ctypes.PyDLL(None).sleep(seconds)

        def add(self, a: int, b: int) -> int:
            return a + b

    return ray.remote(num_cpus=0)(Sleeper).remote()


def test_hanging_workers_are_named_with_their_stacks_killed_and_replaced(ray_local: None) -> None:
    async def hang() -> list[WorkerLost]:
        workers = Sleepers([sleeper() for _ in range(3)], lambda rank: sleeper(), deadline_s=120.0)
        errors = []
        try:
            async with watching(6.0):
                await workers.start(deadline_s=120.0)
                processes = [psutil.Process(place.pid) for place in locations().values()]
                async with asyncio.timeout(60.0):
                    while not locations().keys() <= watch._OOM_KILLS.keys():  # until each has answered
                        await asyncio.sleep(0.1)
                processes[1].suspend()
                calls = [workers.handles[1].add.remote(1, 1), workers.handles[2].sleep_and_hold.remote(600)]
                for rank, call in enumerate(calls, 1):
                    with pytest.raises(WorkerLost) as lost:
                        await workers.one(call, "rewards", rank=rank)
                    errors.append(lost.value)
                    await workers._replace(rank)
                assert await workers.all([h.add.remote(1, rank) for rank, h in enumerate(workers.handles)], "rewards")
                assert not any(process.is_running() for process in processes[1:])
                assert processes[0].is_running()
        finally:
            workers.end()
        return errors

    stopped, holding = asyncio.run(hang())
    for rank, error in ((1, stopped), (2, holding)):
        assert (error.kind, error.role, error.rank) == ("hung", "reward", rank)
        assert f"rewards: reward rank {rank} answered no heartbeat for 6 s (cluster.heartbeat_timeout_s; " in str(error)
        assert error.stack is not None
        assert "MainThread" in error.stack
    assert "sleep_and_hold" in str(holding.stack)
