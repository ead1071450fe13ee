"""The nodes of a run answer or fail, and their load is measured. Integration tests use real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import GlobalState
from ray.exceptions import RayActorError, RayError

from actors.cluster import actor_locations
from actors.cluster import node_metrics as module
from actors.cluster.actor_locations import ActorLocation, draining_node, forget, listed_in, lost_nodes, remember
from actors.cluster.node_metrics import Nodes
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
    not_joined = GlobalState()  # nor does a driver that joins by ray:// have what it takes to ask
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
