"""Track the processes of a group's actors, and end them with the group.

ray.kill only sends a request. A stopped process keeps its memory and ports for seconds, or forever if Ray ends
meanwhile. So processes on the driver's host are killed directly.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from actors.cluster.actor_locations import forget, own_location, remember
from actors.cluster.waiting import wait_all
from rlhf.stopping import finishes_within

logger = logging.getLogger(__name__)
ASKED_S = 1.0  # limit for an orderly end by Ray
GONE_WITHIN_S = 10.0

# Environment of processes that compute on a CPU. Memory freed by a micro-batch or a sync is kept for the next one.
# Returning it to the kernel and faulting it in again page by page took a fifth of an update's time. glibc reads these
# variables when a process starts; other C libraries ignore them.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(256 * 2**20)}

HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")


def hub_environment() -> dict[str, str]:
    """Return the driver's settings of the model hub. All workers need them to find the same models.

    They include no token, because every node logs the environment of its workers.
    """
    return {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ}


class Processes:
    """The processes of one group of actors."""

    def __init__(self, role: str, handles: Sequence[ActorHandle[Any]]) -> None:
        self.role = role
        self.handles = handles
        self.here: list[psutil.Process] = []
        self.actors: list[str] = []
        self.ended = False

    async def wait_until_started(self, *, deadline_s: float) -> None:
        """Wait until all actors are created, and remember the processes on this host."""
        refs = [handle.__ray_call__.remote(own_location) for handle in self.handles]
        node = ray.get_runtime_context().get_node_id()
        locations = await wait_all(refs, role=self.role, stage="start", deadline_s=deadline_s)
        remember(self.role, locations)
        self.actors = [actor for actor, _, _ in locations]
        for _, where, pid in locations:
            if where == node:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.here.append(psutil.Process(pid))

    def _kill(self) -> None:
        for handle in self.handles:
            ray.kill(handle)

    def end(self) -> None:
        """End all processes at once, and wait up to GONE_WITHIN_S for the ones on this host to exit."""
        if self.ended:
            return
        self.ended = True
        forget(self.actors)
        if not finishes_within(GONE_WITHIN_S, self._kill, "ray.kill"):
            logger.warning("%s: Ray did not end the actors within %.0f s", self.role, GONE_WITHIN_S)
        _, alive = psutil.wait_procs(self.here, timeout=ASKED_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(alive, timeout=GONE_WITHIN_S)
        if alive:
            logger.warning(
                "%s: processes %s still exist %.0f s after they were killed",
                self.role,
                ", ".join(str(process.pid) for process in alive),
                GONE_WITHIN_S,
            )
