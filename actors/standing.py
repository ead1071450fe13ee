"""The nodes that a run's actors stand on: remembered while all is well, so that a failure can name them.

Asks a node itself whether it is still there; Ray finds out about a lost link only after its health checks. It must not
ask the head, which may be what is lost.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

ANSWERS_WITHIN_S = 2.0
DRAINING_KNOWN_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where an actor's process is."""

    actor: str
    node: str  # Ray's id
    address: str
    port: int  # of the node's raylet
    pid: int

    def loss(self) -> str | None:
        """What has become of its node; None: it answers."""
        try:
            socket.create_connection((self.address, self.port), timeout=ANSWERS_WITHIN_S).close()
        except ConnectionRefusedError:
            return f"no Ray runs on node {self.address} any more"
        except OSError:
            return f"node {self.address} cannot be reached"
        return None


_STANDING: dict[str, Standing] = {}  # by actor id, which is never used twice


def own_standing(actor: object) -> tuple[str, str, int]:
    """Of the actor in which this is called: its id, its node, its process."""
    context = ray.get_runtime_context()
    return context.get_actor_id() or "", context.get_node_id(), os.getpid()


def remember(found: Sequence[tuple[str, str, int]]) -> None:
    """What actors have said of themselves."""
    nodes = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}
    for actor, node, pid in found:
        if node in nodes:
            address, port = nodes[node]
            _STANDING[actor] = Standing(actor=actor, node=node, address=address, port=port, pid=pid)


def standing(actor: str | None) -> Standing | None:
    """Where an actor is, or was; None: it was never found."""
    return _STANDING.get(actor or "")


def losses(owed: Mapping[ObjectRef[Any], str]) -> str:
    """A sentence on what has become of the nodes of those who owe results, as far as they are lost; else empty.

    owed: who owes each result, such as `policy rank 1`.
    """
    places: dict[str, Standing] = {}
    whose: dict[str, list[str]] = {}
    for ref, who in owed.items():
        place = standing(ref.task_id().actor_id().hex())
        if place is not None:
            places[place.node] = place
            whose.setdefault(place.node, []).append(who)
    if not places:
        return ""
    with ThreadPoolExecutor(max_workers=min(32, len(places))) as pool:
        found = dict(zip(places, pool.map(Standing.loss, places.values()), strict=True))
    lost = [f"{', '.join(sorted(set(whose[node])))}: {loss}" for node, loss in found.items() if loss is not None]
    return f" {'; '.join(sorted(lost))}." if lost else ""


async def leaving(nodes: Collection[str]) -> tuple[str, float | None] | None:
    """One of these nodes that is soon to go, as an autoscaler or `ray drain-node` has told Ray: its address, and the
    time when it goes, if that is known."""
    from ray._private.state import state  # where Ray's own trainer looks

    try:
        told = await asyncio.wait_for(asyncio.to_thread(state.get_draining_nodes), DRAINING_KNOWN_WITHIN_S)
    except TimeoutError:  # whatever keeps the head from answering will show itself in the run's own calls
        return None
    for node, deadline_ms in told.items():
        if node in nodes:
            address = next((place.address for place in _STANDING.values() if place.node == node), node)
            return address, deadline_ms / 1000 if deadline_ms else None
    return None
