"""Failed calls become errors with Ray's messages of real deaths. Processes answer heartbeats, hang, or die."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
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
from unittest.mock import Mock

import psutil
import pytest
import ray
import torch
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from actors.cluster import actor_locations, waiting, watch
from actors.cluster.actor_locations import ActorLocation
from actors.cluster.heartbeat import Beat, Child, OomKills, own_children, own_oom_kills
from actors.cluster.processes import Processes, kill_children
from actors.cluster.waiting import explain, put, wait_all, within
from actors.cluster.watch import hang_of, stack_at, watching
from rlhf.errors import ResultsLost, RunError, StorageFull, WorkerLost
from rlhf.process.disk_full import PAUSE, Shortage
from tests.fakes.calls import ref

KILLED = (
    "The actor died unexpectedly before finishing this task. The actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End "
    "of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) "
    "ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another error. If "
    "the process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg of the OOMing node)"
)


def lost(error: Exception) -> WorkerLost:
    """Return the error of a reward worker's failed call."""
    explained = asyncio.run(explain(error, role="reward", rank=1, stage="rewards"))
    assert isinstance(explained, WorkerLost)
    assert (explained.role, explained.rank, explained.stage) == ("reward", 1, "rewards")
    return explained


def test_a_process_killed_by_the_memory_monitor_names_the_keys_of_its_role() -> None:
    assert lost(RayActorError(error_msg=KILLED)).kind == "died"  # Ray lists memory as a possible cause
    error = lost(OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."))
    assert error.kind == "out_of_memory"
    assert "killed because its node ran out of memory" in str(error)
    assert "reward_policy.processes" in str(error)


def test_results_of_a_lost_node_are_no_fault_of_the_worker_that_needs_them() -> None:
    gone = ObjectLostError("ab" * 28, "", "")
    for error in (gone, RayTaskError("score", "", gone)):
        assert isinstance(lost(error), ResultsLost)
    assert not isinstance(lost(RayActorError(error_msg=KILLED)), ResultsLost)


def test_a_worker_that_dies_with_the_local_ray_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(is_running=lambda: False)
    monkeypatch.setattr(waiting.OWN_RAY, "vital", [gone])
    for error in (RayActorError(error_msg=KILLED), ObjectLostError("ab" * 28, "", "")):
        failure = asyncio.run(explain(error, role="reward", rank=1, stage="rewards"))
        assert type(failure) is RunError
        assert str(failure).startswith("rewards: reward rank 1 was lost with the run's local Ray, which has died. ")


@pytest.mark.parametrize(
    ("cause", "is_lost"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("The size of tensor a must match the size of tensor b"), False),
    ],
)
def test_a_worker_whose_gpu_failed_is_lost_and_one_out_of_memory_is_not(cause: Exception, is_lost: bool) -> None:
    error = RayTaskError("update", "", pickle.loads(pickle.dumps(cause)))
    failure = asyncio.run(explain(error, role="policy", rank=1, stage="update"))
    assert type(failure) is (WorkerLost if is_lost else RunError)
    assert str(failure).startswith("update: policy rank 1 ")
    assert str(cause) in str(failure)


@pytest.mark.parametrize("death", [RayActorError(error_msg=KILLED), OutOfMemoryError("the node is running low")])
def test_a_dead_rank_is_named_and_not_the_peers_that_failed_with_it(death: Exception) -> None:
    peer = RayTaskError("update", "", RuntimeError("Connection closed by peer"))
    with pytest.raises(WorkerLost) as lost:
        asyncio.run(wait_all([ref(peer), ref(death)], role="policy", stage="update", deadline_s=5.0))
    assert lost.value.rank == 1


async def test_time_in_which_the_run_waits_for_room_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PAUSED_FOR_S", 0.01)
    loop = asyncio.get_running_loop()
    result: asyncio.Future[str] = loop.create_future()
    PAUSE.hear("reward rank 0", [Shortage(path="/run", reason="full")])
    loop.call_later(0.3, lambda: (PAUSE.hear("reward rank 0", []), result.set_result("late")))
    assert await within(result, 0.05) == "late"
    with pytest.raises(TimeoutError):
        await within(asyncio.sleep(60.0), 0.01)  # without a pause


@pytest.mark.parametrize(
    "cause",
    [
        StorageFull("/run/a could not be written: No space left on device."),
        ObjectStoreFullError("The local object store is full."),
        OutOfDiskError("Local disk is full"),
    ],
)
def test_a_worker_without_room_is_not_lost_and_a_put_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    error = asyncio.run(explain(RayTaskError("save", "", cause), role="policy", rank=0, stage="checkpoint"))
    assert type(error) is StorageFull
    assert str(error).startswith("checkpoint: policy rank 0 failed: ")
    assert str(cause).splitlines()[0] in str(error)
    if isinstance(cause, OutOfDiskError):
        monkeypatch.setattr("ray.put", Mock(side_effect=cause))
        remedy = r"OutOfDiskError: Local disk is full.*or raise cluster\.object_store_gib"
        with pytest.raises(StorageFull, match=remedy):
            put(1)


WORKER = """
import ctypes, signal
from actors.cluster.heartbeat import answer_heartbeats
def holds_the_interpreter(*_):
    ctypes.PyDLL(None).sleep(600)  # no other thread runs
signal.signal(signal.SIGUSR1, holds_the_interpreter)
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


async def lost_actor(actor: str) -> WorkerLost:
    """The error of a call to a dead actor."""
    error = await explain(RayActorError(actor_id=actor), role="policy", rank=1, stage="update")
    assert isinstance(error, WorkerLost)
    return error


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(60.0):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)


async def stop_after_an_answer(worker: ActorLocation, how: int = signal.SIGSTOP) -> None:
    """Stop a process that has answered, although it computes, until the watch has killed the process."""
    async with asyncio.timeout(60.0), watching(1.0):
        while f"actor {worker.pid}" not in watch._OOM_KILLS and not hang_of(f"actor {worker.pid}"):
            await asyncio.sleep(0.05)
        os.kill(worker.pid, how)
        await until_dead(worker.pid)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGUSR1], ids=["stopped", "holds the interpreter"])
async def test_a_process_that_hangs_is_named_with_its_stack_and_killed(worker: ActorLocation, how: int) -> None:
    await stop_after_an_answer(worker, how)
    error = await lost_actor(f"actor {worker.pid}")
    assert error.kind == "hung"
    silence = "update: policy rank 1 answered no heartbeat for 1 s (cluster.heartbeat_timeout_s; "
    assert f"{silence}process {worker.pid} on 127.0.0.1): it hangs, and was killed." in str(error)
    assert error.stack is not None
    assert ("holds_the_interpreter (" in error.stack) == (how == signal.SIGUSR1)
    assert "computes_for_long (" in error.stack


async def test_a_worker_that_waits_for_room_pauses_the_run(
    worker: ActorLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process answers heartbeats from a second thread while a write waits."""
    events: list[str] = []
    monkeypatch.setattr(watch, "PING_EVERY_S", 0.05)
    beats = iter([(), (Shortage(path="/run/a", reason="full"),), (Shortage(path="/run/a", reason="full"),)])

    async def ping(place: ActorLocation, *, has_answered: bool) -> Beat:
        return Beat(oom_kills=None, shortages=next(beats, ()))

    monkeypatch.setattr(watch, "_ping", ping)
    with PAUSE.reported(lambda shortage: events.append(shortage.path), lambda seconds: events.append("over")):
        async with watching(5.0):
            while "over" not in events:
                await asyncio.sleep(0.02)
    assert events == ["policy rank 1: /run/a", "over"]


def test_a_beat_tells_for_what_the_process_waits() -> None:
    shortage, child = Shortage(path="/run/a", reason="full", free=1), Child(pid=7, began=1764472292.37)
    beat = Beat(oom_kills=OomKills(path="p", count=1), children=(child,), shortages=(shortage,))
    assert Beat.of(json.dumps(asdict(beat)).encode()) == beat


async def test_a_late_process_tells_its_stack_itself(worker: ActorLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "dump_stack", lambda pid: "by another process")
    stack = await stack_at("policy", 1)
    assert stack is not None
    assert stack.index("MainThread") < stack.index("computes_for_long") < stack.index("heartbeat")
    psutil.Process(worker.pid).suspend()
    monkeypatch.setattr(watch, "TICK_S", 0.05)
    assert await stack_at("policy", 1) == "by another process"
    assert await stack_at("policy", 0) is None


async def test_a_connection_that_breaks_off_is_no_death(worker: ActorLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, ask = iter([True]), watch._ask

    async def ask_or_break(place: ActorLocation, question: bytes) -> bytes:
        if next(breaks, False):
            raise ConnectionResetError("the network was away")
        return await ask(place, question)

    monkeypatch.setattr(watch, "_ask", ask_or_break)
    monkeypatch.setattr(watch, "TICK_S", 0.05)
    await stop_after_an_answer(worker)
    assert hang_of(f"actor {worker.pid}")


@pytest.mark.parametrize("refuses", [False, True], ids=["never answered", "behind a firewall that refuses"])
async def test_a_process_that_cannot_be_watched_is_reported_and_not_killed(
    worker: ActorLocation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    port = 1 if refuses else worker.heartbeat_port
    monkeypatch.setattr(actor_locations, "_LOCATIONS", {f"actor {worker.pid}": replace(worker, heartbeat_port=port)})
    psutil.Process(worker.pid).suspend()
    async with watching(0.5), asyncio.timeout(30.0):
        while "cannot be watched" not in caplog.text:
            await asyncio.sleep(0.05)
    assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
    assert f"the driver does not reach port {port} of 127.0.0.1" in caplog.text
    assert hang_of(f"actor {worker.pid}") is None


async def test_a_process_that_ends_is_not_reported(worker: ActorLocation, caplog: pytest.LogCaptureFixture) -> None:
    """Ray fails the calls of a dead process, so the watch simply ends."""
    actor = f"actor {worker.pid}"
    async with watching(0.5):
        while actor not in watch._OOM_KILLS:
            await asyncio.sleep(0.05)
        psutil.Process(worker.pid).kill()
        await until_dead(worker.pid)
        await asyncio.sleep(1.0)
    assert hang_of(actor) is None
    assert caplog.text == ""


async def test_a_stopped_driver_gives_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten hours pass between two looks at the clock, then the answer comes."""
    clock = iter(range(0, 10**6, 36_000))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert await watch._finishes(asyncio.ensure_future(asyncio.sleep(0.3)), 0.8)  # type: ignore[arg-type]


async def test_a_kill_by_the_kernel_for_memory_since_the_last_heartbeat_explains_a_death(
    worker: ActorLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, events = f"actor {worker.pid}", tmp_path / "memory.events"
    events.write_text("oom 1\noom_kill 3\noom_group_kill 0\n")
    monkeypatch.setitem(watch._OOM_KILLS, actor, OomKills(path=str(events), count=3))
    monkeypatch.setattr("actors.cluster.waiting._logs", lambda: Path("/logs"))
    assert (await lost_actor(actor)).kind == "died"
    waiting._CAUSES.clear()
    events.write_text("oom 2\noom_kill 4\noom_group_kill 0\n")
    error = await lost_actor(actor)
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
