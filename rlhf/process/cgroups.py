"""Read the limits of this process' container: control groups of the kernel, version 1 or 2.

A group's limit also holds for the groups below, so the smallest limit on the way up counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60  # version 1 writes a limit above this for none


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """Hold the bytes of a limit, and the bytes still free below the limit."""

    total: int
    free: int  # cached files count as free, because the kernel drops them when memory is short


def groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return the folders of this process' groups for `cpu` or `memory`, the innermost first, always with the top.

    A container may see the container's group as the top of the tree.
    """
    folders: list[Path] = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = Path(name.lstrip("/")).parts
        folders += [top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return folders


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the number of CPUs in the quota of this process. None: no limit."""
    return min(_quotas(root), default=None)


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the smallest limit of memory, with the least free bytes below a limit. None: there is no limit."""
    limits = list(_memory_limits(root))
    if not limits:
        return None
    return MemoryLimit(total=min(limit.total for limit in limits), free=min(limit.free for limit in limits))


def total_memory() -> int:
    """Return the bytes of this machine's memory, or the container's limit if smaller."""
    machine, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()
    return machine if limit is None else min(machine, limit.total)


def _quotas(root: Path) -> Iterator[float]:
    for folder in groups("cpu", root):
        both = _text(folder / "cpu.max") or ""
        old = (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
        quota, period = both.split() if both else old
        if quota not in (None, "max", "-1") and period is not None:
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[MemoryLimit]:
    for folder in groups("memory", root):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit in (None, "max") or used is None or int(limit) >= UNLIMITED_BYTES:
            continue
        counts = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
        cached = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))  # the former: with groups below
        yield MemoryLimit(total=int(limit), free=max(int(limit) - int(used) + cached, 0))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
