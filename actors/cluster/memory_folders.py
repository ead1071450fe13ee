"""Make a folder in the shared memory of a run's nodes. Its files outlive the processes that write them.

The process that makes the folder on a node holds its lock, and the kernel releases the lock when the process ends. So
the next run on the node knows the folders of dead runs, and removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.placement import Placement
from rlhf.errors import RunError, UserError
from rlhf.role_table import Role
from rlhf.stopping import finishes_within

logger = logging.getLogger(__name__)
REMOVED_WITHIN_S = 5.0


def folders_of_user() -> Path:
    """Return the folder with the folders of all runs of this user."""
    return Path(f"/dev/shm/ray-rlhf-{os.getuid()}")


class MemoryFolder:
    """The folder of a run on this node."""

    def __init__(self, path: Path) -> None:
        """Make the folder, and remove its neighbours that dead runs have left.

        RunError: the parent is another user's. UserError: the folder cannot be made.
        """
        try:
            self._make(path)
        except OSError as error:
            raise UserError(
                f"cluster.restarts.gang: is above 0, so the run needs the folder {path} in shared memory, which cannot "
                f"be made ({error.strerror}). Make /dev/shm writable, or use cluster.restarts.gang=0: then the run "
                "ends when a rank is lost."
            ) from error

    def _make(self, path: Path) -> None:
        """Only one process at a time does this, so a folder without a held lock is not one that is being made."""
        parent = path.parent
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise RunError(f"{parent} belongs to another user. Remove it, or set cluster.restarts.gang to 0.")
        self.path = path
        making = os.open(parent / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(making, fcntl.LOCK_EX)
            for other in parent.iterdir():
                if other.is_dir():
                    _remove_if_left(other)
            path.mkdir(mode=0o700)
            self._lock = _locked(path)
        finally:
            os.close(making)

    def remove(self) -> None:
        """Remove the folder. Safe to call twice."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # its run has removed it meanwhile
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Return the lock of a folder, or None if another process holds it."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


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
