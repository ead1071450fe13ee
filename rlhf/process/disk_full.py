"""Wait for room when a disk or shared memory is full, and write again.

A write of a run goes through `when_there_is_room`, in the process of the writer, so that cooperating ranks stay
together. A heartbeat tells the driver that a worker waits. The time in which any process of the run waits counts
towards no deadline of a call. After a process has given up, no later write of the process waits.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlhf.errors import StorageFull
from rlhf.process.stopping import current_request

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
AGAIN_AFTER_S = 20.0  # a quota's room does not show in the free space
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MIB = 2**20
_FIX = "Make room, and continue with --resume auto."


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A place without room at the time of the failed write."""

    path: str
    reason: str
    free: int | None = None  # bytes; None: not known
    needed: int | None = None

    def __str__(self) -> str:
        sizes = ((self.free, "free"), (self.needed, "needed"))
        known = ", ".join(f"{size / _MIB:.1f} MiB are {what}" for size, what in sizes if size is not None)
        return f"{self.path} could not be written: {self.reason}{f' ({known})' if known else ''}."


class Pause:
    """The waits of this process, and in the driver the workers' waits too. Overlapping waits are a single pause."""

    def __init__(self) -> None:
        self.limit_s = 0.0  # of one wait; 0: nothing waits
        self._began: Callable[[Shortage], object] = lambda shortage: None
        self._ended: Callable[[float], object] = lambda seconds: None
        self._guard = threading.RLock()
        self._waits: dict[Hashable, Shortage] = {}
        self._since = 0.0
        self._total_s = 0.0

    @contextmanager
    def limited(self, limit_s: float) -> Iterator[None]:
        """Let the writes of the block wait for room up to limit_s."""
        before, self.limit_s = self.limit_s, limit_s
        try:
            yield
        finally:
            self.limit_s = before

    @contextmanager
    def reported(self, began: Callable[[Shortage], object], ended: Callable[[float], object]) -> Iterator[None]:
        """Call the functions when the run begins to wait for room, and after the wait with the seconds."""
        before = self._began, self._ended
        self._began, self._ended = began, ended
        try:
            yield
        finally:
            self._began, self._ended = before

    def begin(self, key: Hashable, shortage: Shortage) -> None:
        with self._guard:
            is_first = not self._waits
            self._waits[key] = shortage
            if not is_first:
                return
            self._since = time.monotonic()
        limit = f"up to {self.limit_s / 60:g} min (cluster.room_timeout_s)"
        logger.warning("%s The run waits %s for room, and then continues.", shortage, limit)
        self._began(shortage)

    def end(self, key: Hashable) -> None:
        with self._guard:
            shortage = self._waits.pop(key, None)
            if shortage is None or self._waits:
                return
            seconds = time.monotonic() - self._since
            self._total_s += seconds
        logger.warning("the wait for room has ended after %.0f s: %s", seconds, shortage.path)
        self._ended(seconds)

    def current(self) -> list[Shortage]:
        with self._guard:
            return list(self._waits.values())

    def hear(self, who: str, shortages: Iterable[Shortage]) -> None:
        """Record the shortages of another process."""
        shortage = next(iter(shortages), None)
        if shortage is None:
            self.end(who)
        else:
            self.begin(who, shortage)

    def seconds(self) -> float:
        """Return how long the run has waited for room until now."""
        with self._guard:
            return self._total_s + (time.monotonic() - self._since if self._waits else 0.0)

    def give_up(self) -> None:
        """Let no later write wait."""
        self.limit_s = 0.0


PAUSE = Pause()


class _Wait:
    """The wait of a write, which may fail more than once."""

    def __init__(self) -> None:
        self._ends = math.inf
        self._limit_s = PAUSE.limit_s

    def may_go_on(self) -> bool:
        """Return whether the write may wait: within the limit from the first call on, and if no signal ends the run."""
        self._ends = min(self._ends, time.monotonic() + self._limit_s)
        request = current_request()
        return time.monotonic() < self._ends and PAUSE.limit_s > 0.0 and (request is None or request.came is None)

    def failure(self, shortage: Shortage) -> StorageFull:
        """Return the error of a write without room. After the limit, no later write waits."""
        if self._limit_s > 0.0 and time.monotonic() >= self._ends:
            PAUSE.give_up()
            waited = f"No room came within {self._limit_s:.0f} s (cluster.room_timeout_s)."
            return StorageFull(f"{shortage} {waited} {_FIX}")
        return StorageFull(f"{shortage} {_FIX}")


def when_there_is_room(
    path: Path,
    write: Callable[[], T],
    *,
    undo: Callable[[], object] = lambda: None,
    needed: int | None = None,
    waits: bool = True,
) -> T:
    """Return the result of a write. If there is no room, wait, and write again. StorageFull: no room came in time.

    Args:
        path: the file or folder that is written.
        undo: removes the rest of a failed write.
        needed: the size in bytes, if it is known.
        waits: otherwise StorageFull is raised at once.
    """
    wait = _Wait()
    try:
        while True:
            try:
                return write()
            except StorageFull:  # of a nested write, which has already waited
                undo()
                raise
            except Exception as error:
                reason = why_full(error)
                if reason is None:
                    raise
                shortage = Shortage(path=str(path), reason=reason, free=_free(path), needed=needed)
                if not (waits and wait.may_go_on()):
                    undo()
                    raise wait.failure(shortage) from error
            undo()
            PAUSE.begin(wait, shortage)
            _wait_until_more_is_free(path, wait)
    finally:
        PAUSE.end(wait)


def why_full(error: Exception) -> str | None:
    """Return the reason if an error comes from a full disk or an exhausted quota. None: a different cause.

    safetensors raises errors of other types, whose text names the cause.
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in _FULL else None
    text = str(error)
    for code in _FULL:
        if os.strerror(code) in text or f"os error {code})" in text or f"code: {code}," in text:
            return os.strerror(code)
    return None


def _wait_until_more_is_free(path: Path, wait: _Wait) -> None:
    before, again = _free(path), time.monotonic() + AGAIN_AFTER_S
    while time.monotonic() < again and wait.may_go_on():
        time.sleep(LOOK_EVERY_S)
        request = current_request()
        if request is not None:
            request.beats += 1  # the event loop of the driver does not hang, although it waits here
        now = _free(path)
        if before is None or now is None or now > before:
            return


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _existing(path: Path) -> Path:  # the nearest existing folder
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
