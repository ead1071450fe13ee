"""Compare the room in /dev/shm of a node with the snapshots of a run's ranks, before a model is loaded.

Two snapshots of a rank are on the rank's node, and as many copies on another node (rlhf.engine.snapshots). This module
imports nothing heavy, because `rlhf doctor` runs the module on each node.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from rlhf.role_table import Role

NodeId = TypeVar("NodeId", int, str)
SHARED_MEMORY = "/dev/shm"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SnapshotBytes:
    by_role: Mapping[Role, int]  # of the node's own ranks
    copies: int = 0  # of ranks on other nodes

    @property
    def total(self) -> int:
        return sum(self.by_role.values()) + self.copies

    def __str__(self) -> str:
        parts = [f"{role} {nbytes / _GIB:,.2f}" for role, nbytes in self.by_role.items()]
        copies = [f"copies of other nodes {self.copies / _GIB:,.2f}"] if self.copies else []
        return " + ".join([*parts, *copies])


@dataclass(frozen=True, slots=True)
class SharedMemoryRoom:
    """The size of /dev/shm of one node in bytes."""

    total: int
    free: int
    ray: int  # of the object store there, empty or not

    def shortage(self, snapshots: SnapshotBytes) -> str | None:
        """Return a sentence if snapshots and Ray's objects are more than the whole /dev/shm, and None otherwise."""
        needed = snapshots.total + self.ray
        if needed <= self.total:
            return None
        ray = f" + Ray's objects {self.ray / _GIB:,.2f}" if self.ray else ""
        return (
            f"has {self.total / _GIB:,.2f} GiB, and the run needs {needed / _GIB:,.2f} GiB for two snapshots of each "
            f"rank ({snapshots}{ray})"
        )


def shared_memory_here() -> SharedMemoryRoom:
    """Return the size of /dev/shm on this machine, for this process and the process's Ray."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    return SharedMemoryRoom(total=usage.total, free=usage.free, ray=_object_store_bytes())


def _object_store_bytes() -> int:
    """Return the size of Ray's object store in /dev/shm: of the raylet that is a parent or a child of this process.

    The store's file has no name, so this looks at the raylet's open files.
    """
    device, sizes = os.stat(SHARED_MEMORY).st_dev, dict[int, int]()
    process = psutil.Process()
    for raylet in (*process.parents(), *process.children()):
        with contextlib.suppress(psutil.Error, OSError):  # the process has just ended, or belongs to another user
            for file in Path(f"/proc/{raylet.pid}/fd").iterdir() if raylet.name() == "raylet" else ():
                with contextlib.suppress(OSError):  # the file has just been closed
                    status = file.stat()
                    if status.st_dev == device and Path(os.readlink(file)).name.startswith("plasma"):
                        sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def snapshots_by_node(
    sizes: Mapping[Role, int], ranks: Mapping[Role, Sequence[NodeId]], nodes: Collection[NodeId]
) -> dict[NodeId, SnapshotBytes]:
    """Return the bytes of snapshots on each node with snapshots.

    A rank's copies are on the node with the fewest copies, except the rank's node, as in actors.cluster.memory_folders.

    sizes: bytes of one rank, by role. ranks: node of each rank, by role. nodes: all nodes of the run.
    """
    counts, copies = Counter[NodeId](), Counter[NodeId]()
    own: dict[NodeId, Counter[Role]] = {node: Counter() for node in nodes}
    for role, size in sizes.items():
        for node in ranks[role]:
            own[node][role] += size
            others = [other for other in nodes if other != node]
            if others:
                holder = min(others, key=lambda other: (counts[other], other))
                counts[holder] += 1
                copies[holder] += size
    return {node: SnapshotBytes(own[node], copies[node]) for node in nodes if own[node] or copies[node]}


def larger_shared_memory(needed: float) -> str:
    """Return a sentence with the changes for `needed` bytes in /dev/shm, Ray's objects included."""
    gib = math.ceil(needed / _GIB)
    return (
        f"Make /dev/shm of at least {gib} GiB (docker run --shm-size={gib}g, an emptyDir with medium Memory, or mount "
        f"-o remount,size={gib}g /dev/shm), give Ray a smaller object store (ray start --object-store-memory, or "
        "cluster.object_store_gib of a local Ray), put fewer ranks on a node, or use cluster.restarts.gang=0: then the "
        "run ends when a rank is lost."
    )
