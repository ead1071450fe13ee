"""Remember the nodes and processes of a run's actors, for error messages and processes.json.

Nodes are probed directly: Ray notices a lost connection only after health checks, and Ray's head may be lost too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.heartbeat import answer_heartbeats
from rlhf.errors import RunError
from rlhf.process.disk_full import PAUSE
from rlhf.process.stopping import start_thread
from rlhf.tracking.run_folder.atomic import write_atomic

T = TypeVar("T")

logger = logging.getLogger(__name__)
ANSWERS_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorLocation:
    who: str  # for example `policy rank 1`
    node: str  # Ray's id
    address: str
    port: int  # port of the node's raylet
    pid: int
    heartbeat_port: int = 0
    handle: ActorHandle[Any] | None = None

    def node_failure(self) -> str | None:
        """Return a description of the node's failure. None: the node responds."""
        try:
            socket.create_connection((self.address, self.port), timeout=ANSWERS_WITHIN_S).close()
        except ConnectionRefusedError:
            return f"no Ray runs on node {self.address} any more"
        except OSError:
            return f"node {self.address} cannot be reached"
        return None


_LOCATIONS: dict[str, ActorLocation] = {}  # by actor id; ids are never reused
_LISTS: list[Path] = []  # files that list the processes


@contextmanager
def listed_in(path: Path) -> Iterator[None]:
    """List the driver and all actors' processes in a file during the block. A killed driver leaves the list behind."""
    _LISTS.append(path)
    _write_lists()
    try:
        yield
    finally:
        _LISTS.remove(path)
        path.unlink(missing_ok=True)


def ask_location(handle: ActorHandle[Any]) -> ObjectRef[tuple[str, str, int, int]]:
    """Ask an actor for its location, and give the actor this process's time limit for waiting on a full disk."""
    ref: ObjectRef[tuple[str, str, int, int]] = handle.__ray_call__.remote(own_location, PAUSE.limit_s)
    return ref


def own_location(actor: object, room_timeout_s: float) -> tuple[str, str, int, int]:
    """Return id, node and process of the calling actor, and the port at which the process now answers heartbeats."""
    PAUSE.limit_s = room_timeout_s
    context = ray.get_runtime_context()
    port = answer_heartbeats(ray.util.get_node_ip_address())
    return context.get_actor_id() or "", context.get_node_id(), os.getpid(), port


def remember(
    role: str, locations: Mapping[int, tuple[str, str, int, int]], handles: Sequence[ActorHandle[Any]] = ()
) -> None:
    """Remember the locations of a role's workers, by rank."""
    nodes = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}
    for rank, (actor, node, pid, heartbeat_port) in locations.items():
        if node in nodes:
            address, port = nodes[node]
            _LOCATIONS[actor] = ActorLocation(
                **{"who": f"{role} rank {rank}", "node": node, "address": address, "port": port, "pid": pid},
                heartbeat_port=heartbeat_port,
                handle=handles[rank] if handles else None,
            )
    _write_lists()


def forget(actors: Iterable[str]) -> None:
    for actor in actors:
        _LOCATIONS.pop(actor, None)
    _write_lists()


def _write_lists() -> None:
    """Write the lists of the processes. On a full disk the list is lost, but the run continues."""
    actors = [{"who": place.who, "node": place.address, "pid": place.pid} for place in _LOCATIONS.values()]
    rows = [{"who": "driver", "node": None, "pid": os.getpid()}, *actors]
    for path in _LISTS:
        try:
            write_atomic(path, json.dumps(rows, indent=1) + "\n", waits=False)
        except (OSError, RunError) as error:
            logger.warning("%s could not be written: %s", path, error)


def location_of(actor: str | None) -> ActorLocation | None:
    """Return the location of an actor; None if the actor is unknown or ended."""
    return _LOCATIONS.get(actor or "")


def locations() -> dict[str, ActorLocation]:  # of all actors except ended actors
    return dict(_LOCATIONS)


def on_node(node: str, work: Callable[[], T]) -> ObjectRef[T]:
    """Start work in another process on a node."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    result: ObjectRef[T] = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_call).remote(work)
    return result


def _call(work: Callable[[], T]) -> T:
    return work()


async def lost_nodes() -> str:
    """Return a sentence about the run's lost nodes; empty if all respond. A lost node makes other nodes' ranks fail."""
    places = {place.node: place for place in _LOCATIONS.values()}
    if not places:
        return ""
    answers = await asyncio.gather(*[asyncio.to_thread(place.node_failure) for place in places.values()])
    failures = dict(zip(places, answers, strict=True))
    sentences = []
    for node, failure in failures.items():
        if failure is not None:
            names = ", ".join(place.who for place in _LOCATIONS.values() if place.node == node)
            sentences.append(f"{names} ({failure})")
    return f" Lost with its node: {'; '.join(sentences)}." if sentences else ""


async def draining_node(nodes: Callable[[], Collection[str]]) -> tuple[str, float | None] | None:
    """Return the address of a draining node of the run, and its end time if known. nodes: the run's present nodes."""
    going = await draining_nodes()
    used = nodes() if going else ()
    for node, ends_at in going.items():
        if node in used:
            return next((place.address for place in _LOCATIONS.values() if place.node == node), node), ends_at
    return None


async def draining_nodes() -> dict[str, float | None]:
    """Return the nodes that drain, reported by an autoscaler or `ray drain-node`, with end times if known.

    While the head does not respond, the call waits in a thread. The event loop and the process can end all the same.
    """
    from ray._private.state import state  # also used by Ray Train

    future, _ = start_thread(state.get_draining_nodes, "draining nodes")
    try:
        draining = await asyncio.wrap_future(future)
    except RayError:  # a failing head also fails the run's next call
        return {}
    return {node: deadline_ms / 1000 if deadline_ms else None for node, deadline_ms in draining.items()}
