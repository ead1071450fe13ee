"""Refuse a run without room in /dev/shm for the ranks' snapshots, before a model is loaded.

Later, a rank reserves the exact size, and waits for room if other programs fill /dev/shm (rlhf.engine.snapshots).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace

import ray
from ray.exceptions import RayError

from actors.cluster.actor_locations import on_node
from actors.cluster.connect import OWN_RAY
from actors.cluster.placement import Placement
from rlhf.config.schema.root import Config
from rlhf.errors import RunError, UserError
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import snapshot_sizes
from rlhf.planning.shared_memory import (
    SHARED_MEMORY,
    SharedMemoryRoom,
    SnapshotBytes,
    larger_shared_memory,
    shared_memory_here,
    snapshots_by_node,
)

logger = logging.getLogger(__name__)


async def refuse_small_shared_memory(config: Config, placement: Placement) -> None:
    """Raise UserError if /dev/shm of a node is too small for the node's snapshots and for Ray's objects.

    If only copies of other nodes' snapshots have no room, warn: the run works without copies.
    """
    try:
        sizes = snapshot_sizes(footprints(config, Sizes()))
    except UserError as error:
        logger.info("whether %s is large enough is known only when the models are loaded: %s", SHARED_MEMORY, error)
        return
    nodes = placement.nodes()
    needed = snapshots_by_node(sizes, {role: placement.nodes_of(role) for role in sizes}, nodes)
    rooms = await _rooms(needed, limit_s=config.cluster.start_timeout_s)
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()} if len(nodes) > 1 else {}
    for node, room in rooms.items():
        judge(room, needed[node], where=f"{SHARED_MEMORY} of {addresses[node]}" if addresses else SHARED_MEMORY)


def judge(room: SharedMemoryRoom, snapshots: SnapshotBytes, *, where: str) -> None:
    """Raise UserError if a node has no room for its ranks' snapshots. Warn if only copies have no room."""
    if (shortage := room.shortage(snapshots)) is None:
        return
    fix = larger_shared_memory(snapshots.total + room.ray)
    if snapshots.by_role and room.shortage(replace(snapshots, copies=0)) is not None:
        raise UserError(f"cluster.restarts.gang: is above 0, but {where} {shortage}. {fix}")
    logger.warning("%s %s. So this node holds no copies of the snapshots of other nodes. %s", where, shortage, fix)


async def _rooms(nodes: Collection[str], *, limit_s: float) -> dict[str, SharedMemoryRoom]:
    if OWN_RAY.daemons:
        return dict.fromkeys(nodes, shared_memory_here())
    answers = [asyncio.wrap_future(on_node(node, shared_memory_here).future()) for node in nodes]
    try:
        return dict(zip(nodes, await asyncio.wait_for(asyncio.gather(*answers), limit_s), strict=True))
    except (RayError, TimeoutError) as error:
        raise RunError(f"start: a node did not say how large its {SHARED_MEMORY} is: {error}") from error
