"""Nodes of a run answer or fail, are measured, and hold copies of ranks. Folders of dead runs are removed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import GlobalState
from ray.exceptions import RayActorError, RayError

from actors.cluster import actor_locations, connect, memory_folders
from actors.cluster import node_metrics as module
from actors.cluster.actor_locations import ActorLocation, draining_node, forget, listed_in, lost_nodes, remember
from actors.cluster.memory_folders import MemoryFolder, MemoryFolders
from actors.cluster.node_metrics import Nodes
from rlhf.errors import RunError, UserError
from rlhf.process import owned_folders
from rlhf.process.owned_folders import LOCK, alone_in, keep_temporary_files_apart, locked, temporary_folder
from rlhf.tracking.metrics.reductions import Last


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, ActorLocation]:
    """Locations of actors, filled in by the test."""
    places: dict[str, ActorLocation] = {}
    monkeypatch.setattr(actor_locations, "_LOCATIONS", places)
    return places


@pytest.fixture
def raylet() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def at(who: str, node: str, port: int) -> ActorLocation:
    return ActorLocation(who=who, node=node, address="127.0.0.1", port=port, pid=4711)


def test_a_lost_node_is_named_with_all_that_stood_there(
    known: dict[str, ActorLocation], raylet: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.run(lost_nodes()) == ""
    there, gone = raylet.getsockname()[1], free_port()
    known["a"] = at("policy rank 0", "n1", there)
    assert known["a"].node_failure() is None
    known["b"], known["c"] = at("policy rank 1", "n2", gone), at("critic rank 1", "n2", gone)
    what = "no Ray runs on node 127.0.0.1 any more"
    assert asyncio.run(lost_nodes()) == f" Lost with its node: policy rank 1, critic rank 1 ({what})."
    forget(["b", "c", "never known"])
    assert asyncio.run(lost_nodes()) == ""

    def silent(address: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert known["a"].node_failure() == "node 127.0.0.1 cannot be reached"


def test_a_head_that_cannot_be_asked_is_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    not_joined = GlobalState()  # like a driver that joins by ray://, without a connection to the head
    monkeypatch.setattr("ray._private.state.state", not_joined)
    with pytest.raises(RayError):
        not_joined.get_draining_nodes()
    assert asyncio.run(draining_node(lambda: {"n1"})) is None


def test_the_drain_of_a_node_that_replaced_a_lost_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.state.state", SimpleNamespace(get_draining_nodes=lambda: {"n2": 5000}))
    nodes = {"n1"}
    assert asyncio.run(draining_node(lambda: nodes)) is None
    nodes = {"n2"}
    assert asyncio.run(draining_node(lambda: nodes)) == ("n2", 5.0)


def test_the_list_of_processes_follows_them_and_ends_with_the_run(
    known: dict[str, ActorLocation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = {"NodeID": "n1", "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 1}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    path, driver = tmp_path / "processes.json", {"who": "driver", "node": None, "pid": os.getpid()}
    with listed_in(path):
        assert json.loads(path.read_text()) == [driver]
        remember("policy", {0: ("a", "n1", 11, 0), 1: ("b", "n1", 12, 0)})
        ranks = [{"who": f"policy rank {rank}", "node": "10.0.0.1", "pid": 11 + rank} for rank in range(2)]
        assert json.loads(path.read_text()) == [driver, *ranks]
        forget(["a"])
        assert json.loads(path.read_text()) == [driver, ranks[1]]
    assert not path.exists()
    forget(["b"])
    assert not path.exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


HERE, FIRST, SECOND = (digit * 56 for digit in "abc")
ADDRESSES = {HERE: "10.0.0.1", FIRST: "10.0.0.2", SECOND: "10.0.0.3"}
LOAD = {"memory_gib": Last(value=1.0)}


class Run:
    """A run with scripted answers of nodes: a load, an error, or no answer yet (None)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.placed = {HERE, FIRST}
        self.answers: dict[str, Any] = {FIRST: LOAD, SECOND: LOAD}
        self.started: list[str] = []
        self.asked: list[str] = []
        alive = [{"NodeID": node, "NodeManagerAddress": at, "Alive": True} for node, at in ADDRESSES.items()]
        monkeypatch.setattr(module, "ANSWER_WITHIN_S", 0.05)
        monkeypatch.setattr(module, "NodeSampler", lambda: SimpleNamespace(take=lambda: LOAD))
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=self.options))
        placement: Any = SimpleNamespace(nodes=lambda: set(self.placed))
        self.nodes = Nodes(placement)

    def options(self, *, scheduling_strategy: Any, **_: Any) -> Any:
        node = scheduling_strategy.node_id
        self.started.append(node)
        take = SimpleNamespace(remote=lambda: self.ask(node))
        return SimpleNamespace(remote=lambda: SimpleNamespace(take=take))

    def ask(self, node: str) -> Any:
        self.asked.append(node)
        return SimpleNamespace(future=lambda: self.future(node))

    def future(self, node: str) -> Future[Any]:
        future: Future[Any] = Future()
        answer = self.answers[node]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(answer)
        return future

    async def measured(self) -> set[str]:
        """Return the nodes with metrics."""
        addresses = {key.split("/")[1] for key in await self.nodes.use()}
        return {node for node, at in ADDRESSES.items() if at in addresses}


async def test_a_node_that_replaces_a_lost_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    assert await run.measured() == {HERE, FIRST}
    run.placed, run.answers[FIRST] = {HERE, SECOND}, RayActorError()
    assert await run.measured() == await run.measured() == {HERE, SECOND}
    assert run.started == [FIRST, SECOND]
    assert run.asked == [FIRST, FIRST, SECOND, SECOND], "a node whose actor failed is not asked again"


async def test_a_search_for_nodes_that_does_not_return_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node joins, and Ray's GCS stands still for a while."""
    run, answers = Run(monkeypatch), threading.Event()
    found = run.nodes.placement.nodes

    def nodes() -> set[str]:
        assert answers.wait(30.0)
        return found()

    slow: Any = SimpleNamespace(nodes=nodes)
    run.nodes.placement = slow
    run.placed.add(SECOND)
    assert await run.measured() == await run.measured() == {HERE, FIRST}
    answers.set()
    assert await run.measured() == {HERE, FIRST, SECOND}


async def test_a_late_node_is_left_out_only_until_its_answer_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(monkeypatch)
    run.answers[FIRST] = None
    assert await run.measured() == await run.measured() == {HERE}
    assert run.asked == [FIRST], "it is not asked again before it has answered"
    assert len(caplog.records) == 1
    run.answers[FIRST] = LOAD
    assert await run.measured() == {HERE, FIRST}


def test_a_run_removes_the_folders_of_dead_runs_alone(tmp_path: Path) -> None:
    parent = tmp_path / "user"
    dead, other = MemoryFolder(parent / "dead"), MemoryFolder(parent / "other")
    for folder in (dead, other):
        (folder.path / "policy-0").mkdir()
    assert dead._lock is not None
    os.close(dead._lock)  # as the kernel does at the end of a process
    own = MemoryFolder(parent / "own")
    assert sorted(path.name for path in parent.iterdir() if path.is_dir()) == ["other", "own"]
    assert (other.path / "policy-0").is_dir()
    for folder in (own, own, other):
        folder.remove()
    assert not [path for path in parent.iterdir() if path.is_dir()]


def test_a_run_may_remove_its_folder_while_another_one_looks_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, locked = MemoryFolder(tmp_path / "user" / "other"), owned_folders.locked

    def ends_meanwhile(folder: Path) -> int | None:
        if folder == other.path:
            other.remove()
        return locked(folder)

    monkeypatch.setattr(owned_folders, "locked", ends_meanwhile)
    MemoryFolder(tmp_path / "user" / "own").remove()


def test_a_folder_that_cannot_be_made_or_is_another_users_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    for parent in ("a file", "missing/user"):
        with pytest.raises(UserError, match=r"cluster.restarts.gang: .*cluster.restarts.gang=0"):
            MemoryFolder(tmp_path / parent / "run")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(RunError, match="belongs to another user"):
        MemoryFolder(tmp_path / "user" / "run")


def test_a_new_process_of_a_run_takes_over_the_folder_of_a_dead_one(tmp_path: Path) -> None:
    dead = MemoryFolder(tmp_path / "user" / "run")
    (dead.path / "policy-0").mkdir()
    assert dead._lock is not None
    os.close(dead._lock)
    new = MemoryFolder(dead.path)
    MemoryFolder(tmp_path / "user" / "other").remove()
    assert (new.path / "policy-0").is_dir()


class Folders(MemoryFolders):
    """The folders of a run with simulated nodes. Calls of the nodes' processes are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        context, places = SimpleNamespace(get_node_id=lambda: "a"), memory_folders
        monkeypatch.setattr(places.ray, "get_runtime_context", lambda: context)
        of_cluster: Any = lambda: [{"NodeID": node, "Alive": node not in self.dead} for node in "abcd"]  # noqa: E731
        monkeypatch.setattr(places.ray, "nodes", of_cluster)
        monkeypatch.setattr(places, "locations", lambda: {node: SimpleNamespace(node=node) for node in self.of_run})
        super().__init__(start_timeout_s=60.0)
        self.of_run = set(nodes)
        self.dead: set[str] = set()
        self.died: set[str] = set()  # nodes whose process has died
        self.cut: set[str] = set()  # nodes that do not answer
        self.calls: list[str] = []
        self.limits: list[float | None] = []

    async def _ask(self, node: str, method: str, *arguments: Any, limit_s: float | None = None) -> Any:
        self.limits.append(limit_s)
        if node in self.cut:
            raise RunError("it does not answer")
        if node in self.died:
            self.died.discard(node)
            del self._processes[node]
        if method == "write":
            self.calls.append(f"write {arguments} at {node}")
        forget = SimpleNamespace(remote=lambda rank: self.calls.append(f"forget {rank} {node}"))
        self._processes.setdefault(node, SimpleNamespace(node=node, forget=forget))  # type: ignore[arg-type]
        return f"{arguments[0]} at {node}" if method == "place" else None

    async def chosen(self, nodes: Mapping[str, str], **failures: str) -> list[Any]:
        by_rank = {name.replace("_", "-"): failure for name, failure in failures.items()}
        return list((await self.places(nodes, by_rank)).values())


async def test_copies_are_spread_over_the_other_nodes_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(monkeypatch, "a", "b", "c")
    ranks = {"policy-0": "a", "policy-1": "a", "policy-2": "b", "policy-3": "c"}
    expected = ["policy-0 at b", "policy-1 at c", "policy-2 at a", "policy-3 at a"]
    assert await folders.chosen(ranks) == expected
    folders.of_run.add("d")
    assert await folders.chosen(ranks) == expected, "a copy stays where it is"
    assert await folders.chosen({"critic-0": "a"}) == ["critic-0 at d"]
    assert folders.copies_of("policy-1") == "policy-1 at c"
    alone = Folders(monkeypatch, "a")
    assert await alone.chosen({"policy-0": "a"}) == [None]
    assert alone.copies_of("policy-0") is None


async def test_a_rank_gets_another_place_if_its_holder_is_lost_or_is_its_own_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = Folders(monkeypatch, "a", "b", "c")
    ranks = {"policy-0": "a", "policy-1": "a"}
    assert await folders.chosen(ranks) == ["policy-0 at b", "policy-1 at c"]
    folders.dead.add("b")
    assert await folders.chosen(ranks) == ["policy-0 at c", "policy-1 at c"]
    folders.calls.clear()
    assert await folders.chosen({"policy-0": "c"}) == ["policy-0 at a"]
    assert folders.calls == ["forget policy-0 c"]


async def test_a_node_without_room_for_copies_is_not_tried_again_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = Folders(monkeypatch, "a", "b", "c")
    ranks = {"policy-0": "a"}
    await folders.chosen(ranks)
    assert await folders.chosen(ranks, policy_0="no space left") == ["policy-0 at c"]
    assert await folders.chosen(ranks, policy_0="no space left") == [None]
    assert folders.calls == ["forget policy-0 b", "forget policy-0 c"], "what came takes no memory there"
    assert "the last snapshot of policy-0 has no copy on another node: no space left" in caplog.text


async def test_a_node_that_could_hold_no_copies_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(memory_folders.time, "monotonic", lambda: now)
    folders = Folders(monkeypatch, "a", "b")
    ranks = {"policy-0": "a"}
    await folders.chosen(ranks)
    assert await folders.chosen(ranks, policy_0="it was cut off") == [None]
    assert folders.nodes() == {"a"}, "so the ranks look for other places"
    now += memory_folders.TRIED_AGAIN_AFTER_S - 1.0
    assert await folders.chosen(ranks) == [None]
    now += 1.0
    assert folders.nodes() == {"a", "b"}
    folders.cut.add("b")
    assert await folders.chosen(ranks) == [None]
    assert folders.limits[-1] == memory_folders.EXAMINED_WITHIN_S, "training does not wait for it as for a start"
    now += memory_folders.TRIED_AGAIN_AFTER_S
    folders.cut.clear()
    assert await folders.chosen(ranks) == ["policy-0 at b"]


async def test_a_dead_process_that_held_copies_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(monkeypatch, "a", "b")
    ranks = {"policy-0": "a", "policy-1": "a"}
    await folders.chosen(ranks)
    before = folders._processes["b"]
    folders.died.add("b")
    assert await folders.chosen(ranks, policy_0="refused", policy_1="refused") == ["policy-0 at b", "policy-1 at b"]
    assert folders._processes["b"] is not before
    assert not folders.calls, "the new process has nothing to forget"


async def test_a_checkpoint_is_written_from_snapshots_and_for_lost_nodes_from_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(memory_folders, "_write", lambda *arguments: written.append(arguments))
    folders, ranks = Folders(monkeypatch, "a", "b", "c"), {"policy-0": "a", "policy-1": "b", "policy-2": "c"}
    assert await folders.chosen(ranks) == ["policy-0 at b", "policy-1 at a", "policy-2 at a"]
    folders.dead.add("b")
    await folders.write(ranks, 7, tmp_path)
    assert written == [(folders._run / "policy-0", 7, tmp_path, 0)], "the driver reads the memory of its node"
    assert folders.calls == [
        f"write {('policy-1', 7, tmp_path, 1, True)} at a",
        f"write {('policy-2', 7, tmp_path, 2, False)} at c",
    ]
    folders.dead.add("a")
    with pytest.raises(RunError, match="neither the snapshot of policy-0 nor a copy of it can be read: their nodes"):
        await folders.write(ranks, 7, tmp_path)


PROGRAM = """
import tempfile, time
from rlhf.process.owned_folders import keep_temporary_files_apart, temporary_folder
with temporary_folder() as folder:
    (folder / "file").touch()
    kept = keep_temporary_files_apart()
    print(folder, tempfile.mkdtemp(prefix="vllm_dist_"), flush=True)
    time.sleep(60)
"""


def test_the_folders_of_a_killed_process_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs, engines = map(Path, process.stdout.readline().split())
        with temporary_folder() as folder:
            assert list(folder.iterdir()) == []
        assert not folder.parent.exists()
        keep_temporary_files_apart().remove()
        assert (theirs / "file").exists()
        assert engines.is_dir()
        process.kill()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder():
        assert not theirs.parent.exists()
    own = keep_temporary_files_apart()
    assert not engines.parent.exists()
    assert Path(tempfile.mkdtemp()).parent == Path(os.environ["TMPDIR"]) == own.path
    own.remove()
    assert not own.path.exists()


def session(temp: Path, day: int) -> Path:
    path = temp / f"session_2026-01-{day:02d}_12-00-00_000000_1"
    for part in ("logs", "sockets", "ray_spilled_objects_1"):
        (path / part).mkdir(parents=True)
        (path / part / "file").touch()
    return path


def test_a_dead_local_ray_leaves_its_logs_and_nothing_else(tmp_path: Path) -> None:
    sessions = [session(tmp_path, day) for day in range(1, 10)]
    *dead, alive, strange = sessions  # nobody knows the process of the last session
    for path in dead:
        (path / LOCK).touch()
    held = locked(alive)
    assert held is not None
    (tmp_path / "session_latest").symlink_to(alive)
    connect._remove_dead_sessions(tmp_path)
    os.close(held)
    assert [path.exists() for path in sessions] == [False] * 2 + [True] * 7
    assert all((path / part / "file").exists() for path in (alive, strange) for part in ("logs", "sockets"))
    for path in dead[2:]:
        assert [part.name for part in path.iterdir() if part.is_dir()] == ["logs"]
        assert (path / "logs/file").exists()


@pytest.mark.parametrize("call", [connect._remove_dead_sessions, connect._own_session])
def test_no_session_is_locked_while_another_process_looks_for_dead_ones(
    call: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new lock file exists before the lock is held. The new session would be taken for a dead process's."""
    path = session(tmp_path, 1)
    (path / LOCK).touch()
    context, locks = SimpleNamespace(get_session_name=lambda: path.name), list[int]()
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(connect, "_SESSION_LOCKS", locks)
    working = threading.Thread(target=call, args=(tmp_path,))
    with alone_in(tmp_path):
        working.start()
        working.join(0.3)
        assert working.is_alive()
        assert (path / "sockets").exists()
        unheld = locked(path)
        assert unheld is not None
        os.close(unheld)
    working.join(10.0)
    assert not working.is_alive()
    for lock in locks:
        os.close(lock)
