"""Track the processes of a group's actors, and end the processes with the group or before a successor takes over.

ray.kill only sends a request: a stopped process holds memory and ports for seconds, or forever if Ray ends before.
So processes on the driver's host are killed directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.cluster.actor_locations import ActorLocation, ask_location, forget, location_of, on_node, remember
from actors.cluster.heartbeat import Child
from actors.cluster.waiting import START_LIMIT, wait_all, wait_one
from actors.cluster.watch import children_of
from rlhf.process.stopping import finishes_within
from rlhf.role_table import Role

logger = logging.getLogger(__name__)
ASKED_S = 1.0  # limit for an orderly end by Ray
GONE_WITHIN_S = 10.0
LOOK_EVERY_S = 0.05

# Environment of processes that compute on a CPU. Memory freed by a micro-batch or a sync is kept for the next one.
# Returning it to the kernel and faulting it in again page by page took a fifth of an update's time. glibc reads these
# variables when a process starts; other C libraries ignore them.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(256 * 2**20)}

HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")


def hub_environment() -> dict[str, str]:
    """Return the driver's settings of the model hub. All workers need the settings to find the same models.

    The settings include no token, because every node logs the environment of workers.
    """
    return {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ}


def _kill(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Give processes on this host ASKED_S to end, then kill them. Return those still alive GONE_WITHIN_S later."""
    _, alive = psutil.wait_procs(processes, timeout=ASKED_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=GONE_WITHIN_S)
    return list(alive)


def _is_gone(pid: int, children: Sequence[Child]) -> bool:
    """Kill the process of an ended actor on this host, and all children. Return whether all are gone."""
    is_gone = True
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # IndexError: a zombie has no command line
        process = psutil.Process(pid)
        is_other = not process.cmdline()[0].startswith("ray::")  # the id has been given to another process
        is_gone = is_other or not _kill([process])
    return kill_children(children) and is_gone


def kill_children(children: Sequence[Child]) -> bool:
    """Kill processes on this host left over from an ended process. Return whether all are gone, with their memory.

    vLLM reports an engine's end to the engine's workers by a pipe. A worker in a collective never reads the pipe.
    """
    ends = time.monotonic() + GONE_WITHIN_S
    while left := [process for child in children if (process := child.process()) is not None]:
        if time.monotonic() > ends:
            return False
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_EVERY_S)
    return True


class Processes:
    def __init__(self, role: Role, handles: Sequence[ActorHandle[Any]]) -> None:
        """handles: the actors in rank order. The group puts the handle of a worker's successor into this list."""
        self.role = role
        self.handles = handles
        self.here: dict[int, psutil.Process] = {}  # by rank
        self.actors: dict[int, str] = {}  # Ray's ids by rank
        self.ended = False

    async def wait_until_started(self, *, deadline_s: float) -> None:
        refs = [ask_location(handle) for handle in self.handles]
        locations = await wait_all(refs, role=self.role, stage="start", deadline_s=deadline_s, limit=START_LIMIT)
        self._remember(dict(enumerate(locations)))

    async def wait_until_created(self, rank: int, *, deadline_s: float) -> None:
        ref = ask_location(self.handles[rank])
        limits: dict[str, Any] = {"stage": "start", "deadline_s": deadline_s, "limit": START_LIMIT}
        location = await wait_one(ref, role=self.role, rank=rank, **limits)
        self._remember({rank: location})

    def _remember(self, locations: Mapping[int, tuple[str, str, int, int]]) -> None:
        node = ray.get_runtime_context().get_node_id()
        remember(self.role, locations, self.handles)
        for rank, (actor, where, pid, _) in locations.items():
            self.actors[rank] = actor
            if where == node:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.here[rank] = psutil.Process(pid)

    async def end_one(self, rank: int) -> None:
        """End what is left of a worker, and wait until worker and children are gone. Do not wait for a lost node."""
        actor, handle = self.actors.pop(rank, ""), self.handles[rank]
        was, here, children = location_of(actor), self.here.get(rank), children_of(actor)
        forget([actor])
        if not await asyncio.to_thread(finishes_within, GONE_WITHIN_S, partial(ray.kill, handle), "ray.kill"):
            logger.warning("%s: Ray did not end rank %d within %.0f s", self.role, rank, GONE_WITHIN_S)
        if here is not None:
            is_gone = not await asyncio.to_thread(_kill, [here])
            is_gone = await asyncio.to_thread(kill_children, children) and is_gone
            del self.here[rank]  # not before: `end` kills it if this call is cancelled
        else:
            is_gone = was is None or await self._is_gone_elsewhere(was, children)
        if not is_gone:
            logger.warning("%s: the process of rank %d, or a child, still exists after it was killed", self.role, rank)

    async def _is_gone_elsewhere(self, was: ActorLocation, children: Sequence[Child]) -> bool:
        """Kill a process on another node, and all children. Return whether all are gone; True if the node is lost."""
        answer = asyncio.wrap_future(on_node(was.node, partial(_is_gone, was.pid, children)).future())
        try:
            return await asyncio.wait_for(answer, timeout=ASKED_S + 3 * GONE_WITHIN_S)
        except (RayError, TimeoutError):
            return await asyncio.to_thread(was.node_failure) is not None

    def _kill_all(self) -> None:
        for handle in self.handles:
            if handle is not None:  # the rank has had a worker
                ray.kill(handle)

    def end(self) -> None:
        """End all processes at once, and wait up to GONE_WITHIN_S for the exit of processes on this host."""
        if self.ended:
            return
        self.ended = True
        forget(self.actors.values())
        try:
            if not finishes_within(GONE_WITHIN_S, self._kill_all, "ray.kill"):
                logger.warning("%s: Ray did not end the actors within %.0f s", self.role, GONE_WITHIN_S)
        finally:
            alive = _kill(list(self.here.values()))
            kill_children([child for rank in self.here for child in children_of(self.actors.get(rank, ""))])
        if alive:
            pids = f"{', '.join(str(process.pid) for process in alive)} still exist {GONE_WITHIN_S:.0f} s"
            logger.warning("%s: processes %s after they were killed", self.role, pids)
