"""The limits of a container in both versions of the kernel's control groups, on trees of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.data.memory import free_bytes
from rlhf.process.cgroups import MemoryLimit, cpu_quota, groups, memory_limit, total_memory
from rlhf.tracking.run_folder.environment import num_cpus

GIB = 2**30
V1 = "9:name=systemd:/\n4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n"
NONE = 9223372036854771712  # version 1 without a limit


def tree(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "450000 100000"}, 4.5),
        # a pod has 2 CPUs, and its container no limit of its own
        ("0::/pod/c\n", {"sys/fs/cgroup/pod/cpu.max": "200000 100000", "sys/fs/cgroup/pod/c/cpu.max": "max 100000"}, 2),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, None),
        # the container sees its own group at the top of the tree
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 150000, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 50000}, 3),
        (
            V1,
            {
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": 100000,
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": 100000,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            1,
        ),
        ("", {}, None),
    ],
)
def test_the_quota_of_cpus(tmp_path: Path, cgroup: str, files: dict[str, object], quota: float | None) -> None:
    assert cpu_quota(tree(tmp_path, cgroup, files)) == quota


@pytest.mark.parametrize(
    ("cgroup", "names", "limit", "expected"),
    [
        ("0::/\n", ("memory.max", "memory.current", "inactive_file"), "max", None),
        ("0::/\n", ("memory.max", "memory.current", "inactive_file"), 8 * GIB, (8, 6)),
        (V1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), NONE, None),
        (V1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), 8 * GIB, (8, 6)),
    ],
)
def test_the_limit_of_memory(
    tmp_path: Path, cgroup: str, names: tuple[str, str, str], limit: object, expected: tuple[int, int] | None
) -> None:
    top = f"sys/fs/cgroup/{'memory/docker/a/' if cgroup == V1 else ''}"
    stat = f"cache 1\ninactive_file {5 * GIB if cgroup != V1 else 0}\n{names[2]} {5 * GIB}"
    files = {top + names[0]: limit, top + names[1]: 7 * GIB, f"{top}memory.stat": stat}
    found = memory_limit(tree(tmp_path, cgroup, files))
    assert found == (None if expected is None else MemoryLimit(total=expected[0] * GIB, free=expected[1] * GIB))


def test_the_least_memory_of_a_group_and_the_groups_above_counts(tmp_path: Path) -> None:
    files = {}
    for group, limit, used in (("", 4 * GIB, 1 * GIB), ("pod/", 8 * GIB, 6 * GIB)):
        files |= {f"sys/fs/cgroup/{group}memory.max": limit, f"sys/fs/cgroup/{group}memory.current": used}
    assert memory_limit(tree(tmp_path, "0::/pod\n", files)) == MemoryLimit(total=4 * GIB, free=2 * GIB)


def test_the_groups_of_a_process_from_the_innermost_up(tmp_path: Path) -> None:
    tree(tmp_path, V1, {})
    top = tmp_path / "sys/fs/cgroup"
    assert groups("memory", tmp_path) == [top / "memory/docker/a", top / "memory/docker", top / "memory", top]


def test_what_the_limits_are_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for quota, cpus in ((None, 8), (4.5, 4), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr("rlhf.tracking.run_folder.environment.cpu_quota", lambda quota=quota: quota)
        assert num_cpus() == cpus
    limit = MemoryLimit(total=1000, free=10)
    monkeypatch.setattr("rlhf.process.cgroups.memory_limit", lambda: limit)
    monkeypatch.setattr("rlhf.data.memory.memory_limit", lambda: limit)
    assert (total_memory(), free_bytes()) == (1000, 10)
