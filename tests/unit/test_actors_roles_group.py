"""A worker that is replaced, by handles that answer in this process. Real workers: tests/integration."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import ray

from actors.cluster import processes
from actors.roles.group import WorkerGroup

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


def answers(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return SimpleNamespace(future=lambda: future)


class Handle:
    """A worker with a process that sleeps. It notes its starts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(SLEEPS)
        self.starts = 0
        self.__ray_call__ = SimpleNamespace(remote=lambda *_: answers((name, "node", self.process.pid, 0)))
        self.start = SimpleNamespace(remote=self._start)

    def _start(self) -> Any:
        self.starts += 1
        return answers(None)


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
