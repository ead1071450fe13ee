"""A worker ends with all children. Real processes stand in for actors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import ray

from actors.cluster import watch
from actors.cluster.heartbeat import Child, own_children
from actors.cluster.processes import Processes, kill_children

# A worker whose child is blocked: it ignores SIGTERM, and never reads the pipe that ends with the worker.
WORKER = """
import subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(600)
"""


def test_a_blocked_child_of_a_killed_worker_is_gone_before_a_successor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    child = psutil.Process(int(worker.stdout.readline()))
    try:
        handle: Any = object()
        processes = Processes("rollout", [handle])
        processes.here, processes.actors = {0: psutil.Process(worker.pid)}, {0: "actor"}
        (known,) = [found for found in own_children() if found.pid == child.pid]
        monkeypatch.setitem(watch._CHILDREN, "actor", (known,))
        monkeypatch.setattr(ray, "kill", lambda handle: worker.kill())
        asyncio.run(processes.end_one(0))
        assert not psutil.pid_exists(worker.pid)
        assert known.process() is None
    finally:
        worker.kill()
        child.kill()


def test_another_process_with_the_id_of_a_child_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        began = time.monotonic()
        assert kill_children([Child(pid=other.pid, began=1.0)])
        assert time.monotonic() - began < 5.0
        assert other.poll() is None
        other.kill()
