"""Processes answer heartbeats, hang, or die with all children. tests/integration/test_hangs.py uses real workers."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from actors.cluster import actor_locations, waiting, watch
from actors.cluster.actor_locations import ActorLocation
from actors.cluster.heartbeat import Beat, Child, OomKills, own_children, own_oom_kills
from actors.cluster.processes import Processes, kill_children
from actors.cluster.waiting import explain
from actors.cluster.watch import hang_of, stack_at, watching
from rlhf.errors import WorkerLost
from rlhf.process.disk_full import PAUSE, Shortage
from tests.fakes.calls import ref

WORKER = """
from actors.cluster.heartbeat import answer_heartbeats
def computes_for_long():
    print(answer_heartbeats("127.0.0.1"), flush=True)
    while True:
        sum(range(1000))
computes_for_long()
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ActorLocation]:
    """A process that computes and answers heartbeats, as rank 1 of the policy."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(ActorLocation, "node_failure", lambda _: None)
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        place = ActorLocation(
            who="policy rank 1", node="here", address="127.0.0.1", port=1, pid=process.pid, heartbeat_port=port
        )
        monkeypatch.setattr(actor_locations, "_LOCATIONS", {f"actor {process.pid}": place})
        try:
            yield place
        finally:
            process.kill()


def lost(actor: str) -> WorkerLost:
    """The error of a call to a dead actor."""
    error = asyncio.run(explain(RayActorError(actor_id=actor), role="policy", rank=1, stage="update"))
    assert isinstance(error, WorkerLost)
    return error


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(60.0):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)


def stop_after_an_answer(worker: ActorLocation) -> None:
    """Stop a process that has answered, although it computes, until the watch has killed the process."""

    async def stopped() -> None:
        async with asyncio.timeout(60.0), watching(1.0):
            while f"actor {worker.pid}" not in watch._OOM_KILLS and not hang_of(f"actor {worker.pid}"):
                await asyncio.sleep(0.05)
            psutil.Process(worker.pid).suspend()
            await until_dead(worker.pid)

    asyncio.run(stopped())


def wait_until_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def silent() -> None:
        async with watching(0.5), asyncio.timeout(30.0):
            while "cannot be watched" not in caplog.text:
                await asyncio.sleep(0.05)

    asyncio.run(silent())


def test_a_process_that_stops_is_named_with_its_stack_and_killed(worker: ActorLocation) -> None:
    stop_after_an_answer(worker)
    error = lost(f"actor {worker.pid}")
    assert error.kind == "hung"
    assert f"(cluster.heartbeat_timeout_s; process {worker.pid} on 127.0.0.1): it hangs, and was killed." in str(error)
    assert error.stack is not None
    assert "computes_for_long" in error.stack


def test_a_worker_that_waits_for_room_pauses_the_run(
    worker: ActorLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process answers heartbeats from a second thread while a write waits."""
    events: list[str] = []
    monkeypatch.setattr(watch, "PING_EVERY_S", 0.05)

    async def waits() -> None:
        with PAUSE.reported(lambda shortage: events.append(shortage.path), lambda seconds: events.append("over")):
            async with watching(5.0):
                while "over" not in events:
                    await asyncio.sleep(0.02)

    beats = iter([(), (Shortage(path="/run/a", reason="full"),), (Shortage(path="/run/a", reason="full"),)])

    async def ping(place: ActorLocation, *, has_answered: bool) -> Beat:
        return Beat(oom_kills=None, shortages=next(beats, ()))

    monkeypatch.setattr(watch, "_ping", ping)
    asyncio.run(waits())
    assert events == ["policy rank 1: /run/a", "over"]


def test_a_beat_tells_for_what_the_process_waits() -> None:
    shortage, child = Shortage(path="/run/a", reason="full", free=1), Child(pid=7, began=1764472292.37)
    beat = Beat(oom_kills=OomKills(path="p", count=1), children=(child,), shortages=(shortage,))
    assert Beat.of(json.dumps(asdict(beat)).encode()) == beat


def test_a_late_process_tells_its_stack_itself(worker: ActorLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "dump_stack", lambda pid: "by another process")
    stack = asyncio.run(stack_at("policy", 1))
    assert stack is not None
    assert stack.index("MainThread") < stack.index("computes_for_long") < stack.index("heartbeat")
    psutil.Process(worker.pid).suspend()
    monkeypatch.setattr(watch, "TICK_S", 0.05)
    assert asyncio.run(stack_at("policy", 1)) == "by another process"
    assert asyncio.run(stack_at("policy", 0)) is None


def test_a_connection_that_breaks_off_is_no_death(worker: ActorLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, ask = iter([True]), watch._ask

    async def ask_or_break(place: ActorLocation, question: bytes) -> bytes:
        if next(breaks, False):
            raise ConnectionResetError("the network was away")
        return await ask(place, question)

    monkeypatch.setattr(watch, "_ask", ask_or_break)
    monkeypatch.setattr(watch, "TICK_S", 0.05)
    stop_after_an_answer(worker)
    assert hang_of(f"actor {worker.pid}")


@pytest.mark.parametrize("refuses", [False, True], ids=["never answered", "behind a firewall that refuses"])
def test_a_process_that_cannot_be_watched_is_reported_and_not_killed(
    worker: ActorLocation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    port = 1 if refuses else worker.heartbeat_port
    monkeypatch.setattr(actor_locations, "_LOCATIONS", {f"actor {worker.pid}": replace(worker, heartbeat_port=port)})
    psutil.Process(worker.pid).suspend()
    wait_until_reported(caplog)
    assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
    assert f"the driver does not reach port {port} of 127.0.0.1" in caplog.text
    assert hang_of(f"actor {worker.pid}") is None


def test_a_process_that_ends_is_not_reported(worker: ActorLocation, caplog: pytest.LogCaptureFixture) -> None:
    """Ray fails the calls of a dead process, so the watch simply ends."""
    actor = f"actor {worker.pid}"

    async def ends() -> None:
        async with watching(0.5):
            while actor not in watch._OOM_KILLS:
                await asyncio.sleep(0.05)
            psutil.Process(worker.pid).kill()
            await until_dead(worker.pid)
            await asyncio.sleep(1.0)

    asyncio.run(ends())
    assert hang_of(actor) is None
    assert caplog.text == ""


async def test_a_stopped_driver_gives_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten hours pass between two looks at the clock, then the answer comes."""
    clock = iter(range(0, 10**6, 36_000))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert await watch._finishes(asyncio.ensure_future(asyncio.sleep(0.3)), 0.8)  # type: ignore[arg-type]


def test_a_kill_by_the_kernel_for_memory_since_the_last_heartbeat_explains_a_death(
    worker: ActorLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, events = f"actor {worker.pid}", tmp_path / "memory.events"
    events.write_text("oom 1\noom_kill 3\noom_group_kill 0\n")
    monkeypatch.setitem(watch._OOM_KILLS, actor, OomKills(path=str(events), count=3))
    monkeypatch.setattr("actors.cluster.waiting._logs", lambda: Path("/logs"))
    assert lost(actor).kind == "died"
    waiting._CAUSES.clear()
    events.write_text("oom 2\noom_kill 4\noom_group_kill 0\n")
    error = lost(actor)
    assert error.kind == "out_of_memory"
    assert "The kernel killed a process there for memory." in str(error)
    assert "cluster.roles.policy.zero_stage" in str(error)


async def test_the_count_on_another_node_is_asked_once_for_all_calls_and_blocks_nothing(
    worker: ActorLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, asked = f"actor {worker.pid}", list[str]()
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "of the driver"))
    monkeypatch.setitem(watch._OOM_KILLS, actor, OomKills(path="/events", count=3))
    monkeypatch.setattr("actors.cluster.waiting._logs", lambda: Path("/logs"))
    monkeypatch.setattr(watch, "COUNTED_WITHIN_S", 0.2)
    no_answer: Future[OomKills] = Future()

    def on_node(node: str, work: object) -> object:
        asked.append(node)
        return ref(no_answer)

    monkeypatch.setattr(watch, "on_node", on_node)
    calls = [explain(RayActorError(actor_id=actor), role="policy", rank=1, stage="update") for _ in range(20)]
    explaining = asyncio.gather(*calls)
    async with asyncio.timeout(60.0):
        while not asked:
            await asyncio.sleep(0.01)
        assert not explaining.done()
        errors = await explaining
    assert [cast(WorkerLost, error).kind for error in errors] == ["died"] * 20
    assert asked == ["here"]


@pytest.mark.parametrize(
    ("cgroup", "files", "source"),
    [
        ("0::/run/a\n", ["sys/fs/cgroup/run/a/memory.events", "proc/vmstat"], "memory.events"),
        ("0::/run/a\n", ["sys/fs/cgroup/memory.events", "proc/vmstat"], "memory.events"),
        ("4:cpu,memory:/b\n0::/\n", ["sys/fs/cgroup/memory/b/memory.oom_control", "proc/vmstat"], "memory.oom_control"),
        ("1:cpu:/\n", ["proc/vmstat"], "vmstat"),
    ],
)
def test_where_the_kernel_counts_its_kills(cgroup: str, files: list[str], source: str, tmp_path: Path) -> None:
    for number, name in enumerate(files, 7):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"pgfault 5\noom_kill {number}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    kills = own_oom_kills(tmp_path)
    assert kills is not None
    assert (Path(kills.path).name, kills.count) == (source, 7)
    assert own_oom_kills(Path("/nowhere")) is None


def test_a_dump_that_is_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    refused = SimpleNamespace(returncode=1, stderr="Error: Permission denied\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    assert "py-spy could not read process 4711 (Error: Permission denied)" in watch.dump_stack(4711)
    assert sent == [(4711, signal.SIGUSR2)]


# A worker whose child is blocked: it ignores SIGTERM, and never reads the pipe that ends with the worker.
BLOCKED = """
import subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(600)
"""


def test_a_blocked_child_of_a_killed_worker_is_gone_before_a_successor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True)
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
