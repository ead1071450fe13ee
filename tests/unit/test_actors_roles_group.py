"""A group replaces a lost worker. Handles answer in this process; tests/integration starts real workers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import ray
from ray.exceptions import RaySystemError

from actors.cluster import processes
from actors.roles.group import WorkerGroup, ending
from rlhf.errors import WorkerLost
from tests.fakes.calls import method

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


class Handle:
    """A worker with a sleeping process. Starts are recorded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(SLEEPS)
        self.starts = 0
        self.__ray_call__ = method(lambda *_: (name, "node", self.process.pid, 0))
        self.start = method(self._start)

    def _start(self) -> None:
        self.starts += 1


class Workers(WorkerGroup):
    role = "reference"


@pytest.fixture(autouse=True)
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray only receives the request to kill a process."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    monkeypatch.setattr(processes, "ASKED_S", 0.1)


def test_a_replaced_worker_starts_after_the_end_of_its_predecessor_and_alone() -> None:
    first, beside = Handle("first"), Handle("beside")
    created: list[Handle] = []

    def spawn_one(rank: int) -> Any:
        assert rank == 0
        assert not psutil.pid_exists(first.process.pid)
        created.append(Handle("successor"))
        return created[-1]

    async def replaced() -> WorkerGroup:
        workers = Workers(cast("Any", [first, beside]), spawn_one, deadline_s=5.0)
        await workers.start(deadline_s=60.0)
        first.process.send_signal(signal.SIGSTOP)
        await workers._replace(0)
        return workers

    workers = asyncio.run(replaced())
    (successor,) = created
    try:
        assert workers.handles == [successor, beside]
        assert [first.starts, beside.starts, successor.starts] == [1, 1, 1]
        assert psutil.pid_exists(beside.process.pid)
    finally:
        workers.end()
    assert not psutil.pid_exists(beside.process.pid)
    assert not psutil.pid_exists(successor.process.pid)


def test_a_process_whose_end_is_broken_off_ends_with_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Handle("first")
    monkeypatch.setattr(ray, "kill", lambda handle: time.sleep(0.3))

    async def broken_off() -> WorkerGroup:
        workers = Workers(cast("Any", [first]), deadline_s=5.0)
        await workers.start(deadline_s=60.0)
        first.process.send_signal(signal.SIGSTOP)
        replacing = asyncio.create_task(workers.processes.end_one(0))
        await asyncio.sleep(0.1)
        replacing.cancel()
        await asyncio.wait([replacing])
        return workers

    workers = asyncio.run(broken_off())
    assert psutil.pid_exists(first.process.pid)
    workers.end()
    assert not psutil.pid_exists(first.process.pid)


def test_processes_end_although_ray_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Handle("first")

    def kill(handle: Handle) -> None:
        raise RaySystemError("Ray has not been started yet.")

    monkeypatch.setattr(ray, "kill", kill)
    workers = Workers(cast("Any", [first]), deadline_s=5.0)
    asyncio.run(workers.start(deadline_s=60.0))
    with pytest.raises(RaySystemError):
        workers.end()
    assert not psutil.pid_exists(first.process.pid)


class Group:
    """A group with a possible failure in stop or end. The end is recorded."""

    def __init__(self, name: str, ends: list[str], *, stops: Exception | None = None, fails: bool = False) -> None:
        self.name, self.ends, self.stops, self.fails = name, ends, stops, fails

    async def stop(self) -> None:
        if self.stops is not None:
            raise self.stops

    def end(self) -> None:
        self.ends.append(self.name)
        if self.fails:
            raise RuntimeError("Ray is gone")


def test_every_group_ends_and_the_room_is_given_back_although_one_end_fails() -> None:
    ends: list[str] = []

    async def run() -> None:
        groups = [Group("a", ends, fails=True), Group("b", ends)]
        async with ending(groups, lambda: ends.append("room"), heartbeat_timeout_s=60.0):
            pass

    with pytest.raises(RuntimeError, match="Ray is gone"):
        asyncio.run(run())
    assert ends == ["a", "b", "room"]


def test_a_run_that_has_ended_does_not_say_that_it_can_be_resumed(caplog: pytest.LogCaptureFixture) -> None:
    late = WorkerLost("stop: policy rank 1 did not answer.", role="policy", rank=1, stage="stop", kind="hung")

    async def run() -> None:
        async with ending([Group("a", [], stops=late)], lambda: None, heartbeat_timeout_s=60.0):
            pass

    asyncio.run(run())
    assert caplog.messages == ["stop: policy rank 1 did not answer. It is killed instead."]
