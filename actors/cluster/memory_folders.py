"""Make a folder in the shared memory of a run's nodes. Its files outlive the processes that write them.

The next run on a node removes the folders of dead runs there (rlhf.owned_folders).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.placement import Placement
from rlhf.errors import UserError
from rlhf.owned_folders import OwnedFolder
from rlhf.role_table import Role
from rlhf.stopping import finishes_within

logger = logging.getLogger(__name__)
REMOVED_WITHIN_S = 5.0


def folders_of_user() -> Path:
    """Return the folder with the folders of all runs of this user."""
    return Path(f"/dev/shm/ray-rlhf-{os.getuid()}")


class MemoryFolder(OwnedFolder):
    """The folder of a run on this node."""

    def __init__(self, path: Path) -> None:
        """Make the folder, and remove its neighbours that dead runs have left.

        RunError: the parent is another user's. UserError: the folder cannot be made.
        """
        try:
            super().__init__(path)
        except OSError as error:
            raise UserError(
                f"cluster.restarts.gang: is above 0, so the run needs the folder {path} in shared memory, which cannot "
                f"be made ({error.strerror}). Make /dev/shm writable, or use cluster.restarts.gang=0: then the run "
                "ends when a rank is lost."
            ) from error


class MemoryFolders:
    """The folders of a run on all nodes of some roles. They have one path."""

    def __init__(self, placement: Placement, roles: Collection[Role]) -> None:
        here = ray.get_runtime_context().get_node_id()
        nodes = {node for role in roles for node in placement.nodes_of(role)}
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folders_of_user() / name
        self._here = MemoryFolder(self.path) if here in nodes else None
        remote = ray.remote(MemoryFolder)
        self._others: list[ActorHandle[Any]] = [
            remote.options(
                num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(self.path)
            for node in sorted(nodes - {here})
        ]

    async def stop(self) -> None:
        """Do nothing: `end` removes the folders."""

    def end(self) -> None:
        """Remove the folders."""
        if self._here is not None:
            self._here.remove()
        if self._others and not finishes_within(REMOVED_WITHIN_S, self._remove_elsewhere, "ray.get"):
            logger.warning("%s was not removed on all nodes; the next run on them removes it", self.path)
        self._others = []

    def _remove_elsewhere(self) -> None:
        for handle in self._others:
            with contextlib.suppress(RayError):  # a lost node
                ray.get(handle.remove.remote())
            ray.kill(handle)
