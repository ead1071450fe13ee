"""The limits of a container in both versions of control groups, on trees of files, and calls of the kernel."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from rlhf.process.cgroups import MemoryLimit, cpu_quota, groups, memory_limit
from rlhf.process.system_calls import memfd, pidfd_open, pidfd_send_signal, seal

GIB = 2**30
V1 = "9:name=systemd:/\n4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n"
NONE = 9223372036854771712  # version 1 without a limit


def tree(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


CPU, V1_CPU = "sys/fs/cgroup/", "sys/fs/cgroup/cpu/"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {f"{CPU}cpu.max": "max 100000"}, None),
        ("0::/\n", {f"{CPU}cpu.max": "450000 100000"}, 4.5),
        # a pod has 2 CPUs, and its container no limit of its own
        ("0::/pod/c\n", {f"{CPU}pod/cpu.max": "200000 100000", f"{CPU}pod/c/cpu.max": "max 100000"}, 2),
        (V1, {f"{V1_CPU}cpu.cfs_quota_us": -1, f"{V1_CPU}cpu.cfs_period_us": 100000}, None),
        # the container sees its own group at the top of the tree
        (V1, {f"{V1_CPU}cpu.cfs_quota_us": 150000, f"{V1_CPU}cpu.cfs_period_us": 50000}, 3),
        (
            V1,
            {
                **{f"{V1_CPU}{group}cpu.cfs_period_us": 100000 for group in ("", "docker/a/")},
                **{f"{V1_CPU}cpu.cfs_quota_us": -1, f"{V1_CPU}docker/a/cpu.cfs_quota_us": 100000},
            },
            1,
        ),
        ("", {}, None),
    ],
)
def test_the_quota_of_cpus(tmp_path: Path, cgroup: str, files: dict[str, object], quota: float | None) -> None:
    assert cpu_quota(tree(tmp_path, cgroup, files)) == quota


@pytest.mark.parametrize(("limit", "expected"), [(None, None), (8 * GIB, MemoryLimit(total=8 * GIB, free=6 * GIB))])
@pytest.mark.parametrize("cgroup", ["0::/\n", V1])
def test_the_limit_of_memory(tmp_path: Path, cgroup: str, limit: int | None, expected: MemoryLimit | None) -> None:
    is_v1 = cgroup == V1
    top = f"sys/fs/cgroup/{'memory/docker/a/' if is_v1 else ''}memory."
    names = ("limit_in_bytes", "usage_in_bytes") if is_v1 else ("max", "current")
    no_limit = NONE if is_v1 else "max"
    stat = f"cache 1\ninactive_file {0 if is_v1 else 5 * GIB}\n{'total_' if is_v1 else ''}inactive_file {5 * GIB}"
    files = {top + names[0]: limit or no_limit, top + names[1]: 7 * GIB, f"{top}stat": stat}
    assert memory_limit(tree(tmp_path, cgroup, files)) == expected


def test_the_least_memory_of_a_group_and_the_groups_above_counts(tmp_path: Path) -> None:
    files = {}
    for group, limit, used in (("", 4 * GIB, 1 * GIB), ("pod/", 8 * GIB, 6 * GIB)):
        files |= {f"sys/fs/cgroup/{group}memory.max": limit, f"sys/fs/cgroup/{group}memory.current": used}
    assert memory_limit(tree(tmp_path, "0::/pod\n", files)) == MemoryLimit(total=4 * GIB, free=2 * GIB)
    tree(tmp_path, V1, {})
    top = tmp_path / "sys/fs/cgroup"
    assert groups("memory", tmp_path) == [top / "memory/docker/a", top / "memory/docker", top / "memory", top]


def test_a_sealed_file_in_memory_is_constant() -> None:
    with open(memfd("test", is_sealable=True), "r+b", buffering=0) as file:
        file.write(b"content")
        seal(file.fileno())
        for change in (lambda: file.write(b"more"), lambda: file.truncate(1), lambda: file.truncate(100)):
            with pytest.raises(PermissionError):
                change()
        assert os.pread(file.fileno(), 100, 0) == b"content"
        assert not os.get_inheritable(file.fileno())
    with open(memfd("test"), "r+b") as file, pytest.raises(PermissionError):
        seal(file.fileno())  # by default there are no seals
    with pytest.raises(OSError, match="memfd_create: Invalid argument"):
        memfd(250 * "x")


def test_a_descriptor_of_a_process_tells_its_end_and_takes_signals() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        descriptor = pidfd_open(process.pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert not poll.poll(0)
        assert not os.get_inheritable(descriptor)
        pidfd_send_signal(descriptor, signal.SIGKILL)
        assert poll.poll(30_000)
    with pytest.raises(ProcessLookupError):
        pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
