"""Answer the driver's heartbeats in a worker's process, from a separate thread.

To answer, the thread needs Python's interpreter lock. So a process answers while computing or waiting for peers, but
not while stopped, nor during a call that holds the lock. A concurrency group of Ray is no alternative: a heartbeat
would wait for the arguments of earlier calls, and a rank would no longer work in the main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rlhf.process.cgroups import groups
from rlhf.process.disk_full import PAUSE, Shortage

PING, STACKS = b"p", b"s"  # the questions
ASKED_WITHIN_S = 60.0
NEVER_S = 1e6
PR_SET_PTRACER, ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class OomKills:
    """How many processes the kernel has killed for memory, counted in a file of the cgroup or of the machine."""

    path: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A child or later descendant of a worker's process. The kernel may give the id to another process later."""

    pid: int
    began: float  # seconds since 1970

    def process(self) -> psutil.Process | None:
        """Return the process on this host. None: the process has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    oom_kills: OomKills | None  # None: there is no count
    children: tuple[Child, ...] = ()
    shortages: tuple[Shortage, ...] = ()  # for which the process waits

    @classmethod
    def of(cls, answer: bytes) -> Beat:
        tree = json.loads(answer)
        kills = tree["oom_kills"]
        return cls(
            oom_kills=None if kills is None else OomKills(**kills),
            children=tuple(Child(**child) for child in tree["children"]),
            shortages=tuple(Shortage(**shortage) for shortage in tree["shortages"]),
        )


def count_oom_kills(path: str) -> OomKills | None:
    """Return the count in a file with a line `oom_kill N`; None if there is no such file or line."""
    with contextlib.suppress(OSError):
        counts = dict(line.split(" ", 1) for line in Path(path).read_text(encoding="ascii").splitlines() if " " in line)
        if "oom_kill" in counts:
            return OomKills(path=path, count=int(counts["oom_kill"]))
    return None


def own_oom_kills(root: Path = Path("/")) -> OomKills | None:
    """Return the kills in the cgroup of this process, or of the whole machine if the cgroup has no count."""
    names = ("memory.events", "memory.oom_control")  # of version 2 and 1
    candidates = [folder / name for folder in groups("memory", root) for name in names]
    counts = (count_oom_kills(str(path)) for path in (*candidates, root / "proc/vmstat"))
    return next((count for count in counts if count is not None), None)


def own_children() -> Iterator[Child]:
    """Yield all descendants of this process, as the kernel lists them by thread. (psutil's search takes 40 ms.)"""
    parents = [os.getpid()]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has just ended
                for pid in map(int, children.read_text(encoding="ascii").split()):
                    yield Child(pid=pid, began=psutil.Process(pid).create_time())
                    parents.append(pid)


def all_stacks() -> str:
    """Return the stacks of all threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    return "\n".join(
        f'Thread "{names.get(ident, ident)}"\n{"".join(traceback.format_stack(frame))}' for ident, frame in frames
    )


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(ASKED_WITHIN_S)
        with contextlib.suppress(OSError):  # the driver no longer waits
            if self.request.recv(1) == STACKS:
                self.request.sendall(all_stacks().encode())
            else:
                beat = Beat(oom_kills=own_oom_kills(), children=tuple(own_children()), shortages=tuple(PAUSE.current()))
                self.request.sendall(json.dumps(asdict(beat)).encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


_SERVERS: list[_Server] = []  # the one of this process


def answer_heartbeats(host: str) -> int:
    """Start to answer heartbeats at this host's address, once per process. Return the port.

    From then on, py-spy of the same user may read the process even if the kernel (Yama) otherwise allows only parents.
    On SIGUSR2 the process writes the stacks of all threads to the log; this needs no special right.
    """
    if not _SERVERS:
        _Server.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = _Server((host, 0), _Answer)
        threading.Thread(target=server.serve_forever, args=(NEVER_S,), name="heartbeat", daemon=True).start()
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        _SERVERS.append(server)
    return int(_SERVERS[0].server_address[1])
