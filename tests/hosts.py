"""Make several hosts on one machine: network namespaces joined by a bridge, each with an address, names and processes.

A host's processes reach other hosts only by the host's link. A test can cut the link. Disks, clocks and memory are
shared. Needs root and iproute2. A test ends a host's processes by pid: `ray stop` would end every Ray of the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.engine.distributed import INTERFACE_VARIABLES

ONE_THREAD = {"threads": 1, "cpus": 1.0}

BIN = Path(sys.executable).parent
NETWORK = "10.77.0"  # of every bridge; no bridge is joined to another bridge or to the machine's network
GCS_PORT = 6379
MOUNTED = "at"  # where each host sees its own disk
START_WITHIN_S = 90.0
GONE_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    link: str  # the bridge's end of the host's cable
    disk: Path  # the host's own; two nodes would write Ray's files to one path

    def start(
        self, command: Sequence[str | Path], env: Mapping[str, str] = {}, **options: Any
    ) -> subprocess.Popen[str]:
        """Run a command on the host, in a new process group, without the interface chosen by a gang of this process."""
        here = {name: value for name, value in os.environ.items() if name not in INTERFACE_VARIABLES}
        place = self.disk.parent / MOUNTED
        with_disk = ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", str(self.disk), str(place)]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *with_disk, *map(str, command)],
            text=True,
            start_new_session=True,
            env={**here, "RAY_TMPDIR": str(place), **env},
            **options,
        )

    def run(self, command: Sequence[str | Path], env: Mapping[str, str] = {}, *, timeout_s: float = 60.0) -> str:
        """Run a command on the host to its end, and return the output. The command must succeed."""
        process = self.start(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            raise AssertionError(f"{command} on {self.name}: not done in {timeout_s:g} s\n{said}") from None
        assert process.returncode == 0, f"{command} on {self.name}: exit {process.returncode}\n{said}"
        return said

    def pids(self) -> list[int]:
        return _pids(self.name)

    def kill(self) -> None:
        """End all processes of the host at once, like a power failure."""
        _kill_all(self.name)

    def cut(self, *, is_cut: bool = True) -> None:
        """Cut the host's link, or restore it. The processes of the host run on, alone."""
        _output("ip", "link", "set", self.link, "down" if is_cut else "up")

    def add_interface(self, name: str, address: str) -> None:
        """Add an interface without a link. From now on the host's name stands for the interface's address."""
        inside = ("ip", "-n", self.name)
        _output(*inside, "link", "add", name, "type", "veth", "peer", "name", f"{name}x")
        _output(*inside, "address", "add", f"{address}/24", "dev", name)
        for end in (name, f"{name}x"):
            _output(*inside, "link", "set", end, "up")
        _give_names(self.name, address, [])


@contextmanager
def several_hosts(count: int) -> Iterator[list[Host]]:
    """Yield hosts 10.77.0.1 to .count, called host0, host1, ..., gone after the block. Skips without namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("SEVERAL HOSTS NOT TESTED: needs root and iproute2 (apt-get install iproute2)")
    _remove_left_behind()
    me, bridge = os.getpid(), f"rlbr{os.getpid()}"
    names = [f"rlhf-{me}-{i}" for i in range(count)]
    disks = Path(f"/tmp/rl{me}")  # short: the paths of Ray's sockets lie below it
    with ExitStack() as after:
        tried = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
        if tried.returncode != 0:
            pytest.skip(f"SEVERAL HOSTS NOT TESTED: no network namespace can be made: {tried.stderr.strip()}")
        after.callback(_remove, me)
        for name in names[1:]:
            _output("ip", "netns", "add", name)
        _output("ip", "link", "add", bridge, "type", "bridge")
        _output("ip", "link", "set", bridge, "up")
        for folder in (MOUNTED, *map(str, range(count))):
            (disks / folder).mkdir(parents=True)
        addresses = [f"{NETWORK}.{i + 1}" for i in range(count)]
        hosts = [Host(names[i], addresses[i], _link(me, i), disks / str(i)) for i in range(count)]
        for host in hosts:
            _connect(host.name, host.address, bridge, host.link)
            _give_names(host.name, host.address, addresses)
        yield hosts


def start_ray(
    hosts: Sequence[Host], *, cpus: Sequence[float], labels: Sequence[str] = (), env: Mapping[str, str] = {}
) -> str:
    """Start a Ray with the head on the first host. Return the address. cpus, labels (as pool=gpu): of each node."""
    address = f"{hosts[0].address}:{GCS_PORT}"
    head, joins = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"], f"--address={address}"
    said = [[f"--labels={label}"] for label in labels] or [[] for _ in hosts]
    options = [[f"--num-cpus={n:g}", *label] for n, label in zip(cpus, said, strict=True)]
    start_node(hosts[0], *head, *options[0], env=env)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda i: start_node(hosts[i], joins, *options[i], env=env), range(1, len(hosts))))
    return address


def start_node(host: Host, *options: str, env: Mapping[str, str] = {}) -> None:
    """Call `ray start` on a host, in the background. The niceness is that of the tests, the object store is small."""
    store = "--object-store-memory=134217728"
    common = {"RAY_worker_niceness": "0", **env}
    host.run([BIN / "ray", "start", "--disable-usage-stats", store, *options], common, timeout_s=START_WITHIN_S)


def _connect(name: str, address: str, bridge: str, link: str) -> None:
    _output("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _output("ip", "link", "set", link, "master", bridge, "up")
    inside = ("ip", "-n", name)
    _output(*inside, "address", "add", f"{address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        _output(*inside, "link", "set", interface, "up")
    _output(*inside, "route", "add", "default", "dev", "eth0")


def _give_names(name: str, address: str, addresses: Sequence[str]) -> None:
    """Write the files that `ip netns exec` puts over /etc/hosts and /etc/resolv.conf: no name leaves the machine."""
    folder = Path("/etc/netns", name)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", f"{address} {socket.gethostname()}"]
    lines += [f"{other} host{i}" for i, other in enumerate(addresses)]
    (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "resolv.conf").write_text("", encoding="utf-8")


def _link(owner: int, index: int) -> str:  # the outer end of a host's cable
    return f"rl{owner}v{index}"


def _remove(owner: int) -> None:
    names = [name for name in _namespaces() if name.startswith(f"rlhf-{owner}-")]
    for name in names:
        _kill_all(name)
    for name in names:  # the link goes with its namespace, but too late: the next host may need the name
        subprocess.run(["ip", "link", "delete", _link(owner, int(name.rsplit("-", 1)[1]))], capture_output=True)
        _output("ip", "netns", "delete", name)
        shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
    subprocess.run(["ip", "link", "delete", f"rlbr{owner}"], capture_output=True)
    shutil.rmtree(f"/tmp/rl{owner}", ignore_errors=True)


def _remove_left_behind() -> None:  # left by killed test runs
    owners = {int(match[1]) for match in map(re.compile(r"rlhf-(\d+)-\d+").fullmatch, _namespaces()) if match}
    for owner in owners:
        if not Path("/proc", str(owner)).exists():
            _remove(owner)


def _kill_all(name: str) -> None:
    until = time.monotonic() + GONE_WITHIN_S
    while pids := _pids(name):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < until, f"processes {pids} of {name} do not end"
        time.sleep(0.05)


def _pids(name: str) -> list[int]:
    return [int(word) for word in _output("ip", "netns", "pids", name).split()]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _output("ip", "netns", "list").splitlines() if line.strip()]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


POOLS = {"policy": "train", "rollout": "serve"}


_ROLES = {
    **{"policy": {"workers": 2, **ONE_THREAD}, "critic": {"workers": 2, "threads": 1}, "rollout": ONE_THREAD},
    **{"reference": {"threads": 1}, "reward": {"threads": 1}},
}
THREE_BUNDLES: Mapping[str, Any] = {
    "algorithm": {"name": "ppo"},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "train": {"steps": 3, "checkpoint_every": 3},
    "eval": {"every": 3, "at_start": False},
    "cluster": {"object_store_gib": None, "roles": _ROLES},
}


# The options of docs/multinode.md for the head.
_WAITS = {f"RAY_health_check_{wait}_ms": "1000" for wait in ("initial_delay", "period", "timeout")}
QUICK_HEALTH = {**_WAITS, "RAY_health_check_failure_threshold": "3"}
