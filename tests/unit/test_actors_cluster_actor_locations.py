"""The nodes of a run answer or fail. tests/integration/test_node_loss.py loses real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.state import GlobalState
from ray.exceptions import RayError

from actors.cluster import actor_locations
from actors.cluster.actor_locations import ActorLocation, draining_node, forget, listed_in, lost_nodes, remember


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
