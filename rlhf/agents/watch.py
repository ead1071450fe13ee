"""End the sessions with processes over a limit.

The kernel limits single processes and files. The sum over all processes of a session is measured repeatedly.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf.agents.limits import ProcessLimits
from rlhf.agents.usage import disk_of, memory_of, tree_of
from rlhf.process.system_calls import pidfd_open, pidfd_send_signal

LOOK_EVERY_S = 0.25
LOOKING_SHARE = 0.05  # largest part of a core's time for each of the two kinds of measurements
GIB = 2**30


@dataclass(slots=True, eq=False)
class WatchedProcess:
    """A running session."""

    leader: int
    folder: Path
    pidfd: int  # of the leader
    exceeded: str | None = None  # the limit that ended the session

    def end(self, exceeded: str) -> None:
        """Kill the leader. The host then kills all processes below."""
        self.exceeded = exceeded
        with contextlib.suppress(ProcessLookupError):
            pidfd_send_signal(self.pidfd, signal.SIGKILL)


class ProcessWatch:
    """Watches sessions from `start` to `stop`."""

    def __init__(self, limits: ProcessLimits, *, key: str) -> None:
        self.limits = limits
        self.key = key  # the section of the limits in messages
        self._host = 0
        self._sessions: set[WatchedProcess] = set()
        self._looking: list[asyncio.Task[None]] = []

    def start(self, host: int) -> None:
        """Begin the measurements. `host` is the process that forks the sessions."""
        self._host = host
        self._looking = [asyncio.create_task(self._look(kind)) for kind in (self._over_processes, self._over_disk)]

    async def stop(self) -> None:
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)

    @contextmanager
    def watching(self, leader: int, folder: Path) -> Iterator[WatchedProcess]:
        """Watch a session for the length of the block."""
        for task in self._looking:
            if task.done():
                task.result()  # raises the error that ended the measurements
        session = WatchedProcess(leader, folder, pidfd_open(leader))
        self._sessions.add(session)
        try:
            yield session
        finally:
            self._sessions.remove(session)
            os.close(session.pidfd)

    async def _look(self, over: Callable[[WatchedProcess], str | None]) -> None:
        """Measure all sessions repeatedly, and end sessions over a limit."""

        def measured(sessions: Sequence[WatchedProcess]) -> tuple[list[str | None], float]:
            began = time.thread_time()
            return [over(session) for session in sessions], time.thread_time() - began

        while True:
            sessions = tuple(self._sessions)
            results, cpu_s = await asyncio.to_thread(measured, sessions)
            for session, exceeded in zip(sessions, results, strict=True):
                if exceeded is not None and session in self._sessions:
                    session.end(exceeded)
            await asyncio.sleep(max(LOOK_EVERY_S, cpu_s / LOOKING_SHARE))

    def _over_processes(self, session: WatchedProcess) -> str | None:
        pids, threads = tree_of(session.leader, most=self.limits.max_threads)
        if threads > self.limits.max_threads:
            return f"the session had more threads than {self.key}.max_threads: {self.limits.max_threads}"
        if memory_of(pids, limit=int(self.limits.memory_gib * GIB)) > self.limits.memory_gib * GIB:
            return f"the session's processes took more than {self.key}.memory_gib: {self.limits.memory_gib:g}"
        return None

    def _over_disk(self, session: WatchedProcess) -> str | None:
        limit = int(self.limits.disk_gib * GIB)
        pids, _ = tree_of(session.leader, most=self.limits.max_threads)
        if disk_of(session.folder, pids, without=self._host, limit=limit) > limit:
            return f"the session's files took more than {self.key}.disk_gib: {self.limits.disk_gib:g}"
        return None
