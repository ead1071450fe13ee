"""Make a folder in the shared memory of each of a run's nodes. The files outlive the writing processes.

The process that owns a node's folder also holds copies of the snapshots of other nodes' ranks. The next run on a node
removes the folders of dead runs there (rlhf.process.owned_folders).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.util
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.actor_locations import locations
from rlhf.engine.snapshot_copies import CopyHolder, CopyPlace
from rlhf.errors import RunError, UserError
from rlhf.process.owned_folders import OwnedFolder
from rlhf.process.stopping import finishes_within

logger = logging.getLogger(__name__)
REMOVED_WITHIN_S = 5.0
EXAMINED_WITHIN_S = 5.0
TRIED_AGAIN_AFTER_S = 300.0  # a node that could hold no copies


def folders_of_user() -> Path:
    return Path(f"/dev/shm/ray-rlhf-{os.getuid()}")


class MemoryFolder(OwnedFolder):
    def __init__(self, path: Path) -> None:
        """Make the folder, or take over the folder of a dead process of this run. UserError: it cannot be made."""
        try:
            super().__init__(path)
        except OSError as error:
            raise UserError(
                f"cluster.restarts.gang: is above 0, so the run needs the folder {path} in shared memory, which cannot "
                f"be made ({error.strerror}). Make /dev/shm writable, or set cluster.restarts.gang=0. With 0, the run "
                "ends when a rank is lost."
            ) from error


class NodeMemory:
    """The process that owns the run's folder on a node, and holds copies of other nodes' snapshots."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder: MemoryFolder | None = None

    def open(self) -> None:
        """Make the folder, unless already made."""
        if self._folder is None:
            self._folder = MemoryFolder(self._path)
            self._holder = CopyHolder(self._path / "copies", ray.util.get_node_ip_address())

    def place(self, rank: str) -> CopyPlace:
        return self._holder.place(rank)

    def forget(self, rank: str) -> None:
        self._holder.forget(rank)

    def write(self, rank: str, step: int, checkpoint: Path, number: int, is_copy: bool) -> None:
        """Write the snapshot of a rank of this node, or the copy held here, into a checkpoint."""
        _write(self._path / "copies" / rank if is_copy else self._path / rank, step, checkpoint, number)

    def remove(self) -> None:
        if self._folder is not None:
            self._holder.close()
            self._folder.remove()


class MemoryFolders:
    """The folders of a run on the run's nodes, and the places of the copies of each rank's snapshots.

    The driver owns the folder on the driver's node. On other nodes, and for all copies, a process there is the owner.
    """

    def __init__(self, *, start_timeout_s: float) -> None:
        self._start_timeout_s = start_timeout_s
        self._here: str = ray.get_runtime_context().get_node_id()
        self._run = folders_of_user() / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._own: MemoryFolder | None = None
        self._processes: dict[str, ActorHandle[Any]] = {}  # by node
        self._holders: dict[str, str] = {}  # the node with the copies of a rank, by the rank's name, such as policy-1
        self._places: dict[str, CopyPlace] = {}  # there, by the rank's name
        self._unfit: dict[str, float] = {}  # nodes that could hold no copies, and when (time.monotonic)
        self._alone = asyncio.Lock()

    async def open(self, nodes: Collection[str]) -> list[Path]:
        """Return the run's folder on each node, made and locked. UserError if a folder cannot be made."""
        async with self._alone:
            for node in dict.fromkeys(nodes):
                if node != self._here:
                    await self._ask(node, "open")
                elif self._own is None:
                    self._own = MemoryFolder(self._run)
        return [self._run if node == self._here else self._path(node) for node in nodes]

    def nodes(self) -> frozenset[str]:
        """Return the nodes of the run's actors, except nodes that failed to hold copies a short time ago."""
        now = time.monotonic()
        unfit = {node for node, since in self._unfit.items() if now - since < TRIED_AGAIN_AFTER_S}
        return frozenset(place.node for place in locations().values()) - unfit

    def copies_of(self, rank: str) -> CopyPlace | None:
        return self._places.get(rank)

    async def places(self, nodes: Mapping[str, str], failures: Mapping[str, str]) -> dict[str, CopyPlace | None]:
        """Return where each rank shall send copies: to another node of the run, if any.

        A rank keeps a place as long as the place is usable. A new place is on the node with the fewest copies. nodes:
        the node of each rank. failures: why a rank's last copy has failed. Both have the rank's name as the key.
        """
        async with self._alone:
            for rank, failure in failures.items():
                logger.warning("the last snapshot of %s has no copy on another node: %s", rank, failure)
            for node in {self._holders[rank] for rank in failures if rank in self._holders}:
                await self._examine(node)
            fit = self.nodes() & {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            for rank, node in nodes.items():
                if rank in failures or self._holders.get(rank) not in fit - {node}:
                    await self._choose(rank, fit - {node})
            return {rank: self._places.get(rank) for rank in nodes}

    async def write(self, nodes: Mapping[str, str], step: int, checkpoint: Path) -> None:
        """Write the snapshots of a step into a checkpoint: each from the rank's node, or from a copy.

        nodes: the node of each rank in the order of the ranks, by the rank's name. RunError: a snapshot is lost.
        """
        async with self._alone:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            for number, (rank, node) in enumerate(nodes.items()):
                failures: list[str] = []
                places = [(node, False), *((holder, True) for name, holder in self._holders.items() if name == rank)]
                for holder, is_copy in places:
                    if holder not in alive:
                        continue
                    try:
                        if holder == self._here and not is_copy:
                            await asyncio.to_thread(_write, self._run / rank, step, checkpoint, number)
                        else:
                            await self._ask(holder, "write", rank, step, checkpoint, number, is_copy)
                        break
                    except (OSError, RunError) as error:
                        failures.append(str(error))
                else:
                    reason = "; ".join(failures) or "their nodes are lost"
                    raise RunError(f"neither the snapshot of {rank} nor a copy of it can be read: {reason}")

    async def _choose(self, rank: str, candidates: Collection[str]) -> None:
        before = self._holders.pop(rank, None)
        self._places.pop(rank, None)
        if before in self._processes:
            self._processes[before].forget.remote(rank)
        loads = Counter(self._holders.values())
        for node in sorted(candidates, key=lambda node: (loads[node], node)):
            limit_s = EXAMINED_WITHIN_S if node in self._unfit else None  # an unfit node may still not answer
            try:
                await self._ask(node, "open", limit_s=limit_s)
                self._places[rank] = await self._ask(node, "place", rank, limit_s=limit_s)
            except (RunError, UserError) as error:
                logger.warning("a node cannot hold copies of snapshots: %s", error)
                self._unfit[node] = time.monotonic()
                continue
            self._unfit.pop(node, None)
            self._holders[rank] = node
            return

    async def _examine(self, node: str) -> None:
        """Find out why a copy failed: the node's process has died, or the node has, for example, too little memory."""
        process = self._processes.get(node)
        try:
            await self._ask(node, "open", limit_s=EXAMINED_WITHIN_S)
            is_new = self._processes[node] is not process
        except RunError:
            is_new = False
        if not is_new:
            self._unfit[node] = time.monotonic()
            return
        self._holders = {rank: other for rank, other in self._holders.items() if other != node}

    async def _ask(self, node: str, method: str, *arguments: Any, limit_s: float | None = None) -> Any:
        """Call the process on a node. Start a missing or dead process first."""
        is_new = node not in self._processes
        if is_new:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = ray.remote(NodeMemory).options(num_cpus=0, max_restarts=0, scheduling_strategy=there)
            self._processes[node] = options.remote(self._path(node))
        answer = getattr(self._processes[node], method).remote(*arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer.future()), limit_s or self._start_timeout_s)
        except RayTaskError as error:
            raise (UserError if isinstance(error.cause, UserError) else RunError)(str(error.cause)) from error
        except (RayError, TimeoutError) as error:
            if isinstance(error, RayActorError):
                del self._processes[node]
                if not is_new:
                    return await self._ask(node, method, *arguments, limit_s=limit_s)
            raise RunError(f"the process for snapshots on node {node} does not answer: {error}") from error

    def _path(self, node: str) -> Path:
        return self._run.with_name(f"{self._run.name}-{node[:12]}")

    async def stop(self) -> None:
        """Do nothing: `end` removes the folders."""

    def end(self) -> None:
        if self._own is not None:
            self._own.remove()
        if self._processes and not finishes_within(REMOVED_WITHIN_S, self._remove_elsewhere, "ray.get"):
            logger.warning(
                "the snapshots of run %s were not removed on all nodes; the next run on such a node removes them",
                self._run,
            )
        self._processes = {}

    def _remove_elsewhere(self) -> None:
        removals = [(handle, handle.remove.remote()) for handle in self._processes.values()]
        for handle, removal in removals:
            with contextlib.suppress(RayError):  # a lost node
                ray.get(removal)
            ray.kill(handle)


def _write(source: Path, step: int, checkpoint: Path, number: int) -> None:
    from rlhf.engine.rank_files import write_snapshot  # with torch, which a holder needs only here

    write_snapshot(source, step, checkpoint, number)
