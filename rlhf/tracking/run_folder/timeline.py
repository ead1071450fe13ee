"""timeline.json: the work of each role over time, as a Chrome trace for Perfetto (ui.perfetto.dev).

Each role has one row group, with as many lanes as spans at once. Events are written as they end, so a killed run loses
only the open spans. A resumed run continues the same file. The module measures nothing itself. While the file cannot be
written, as on a full disk, the run continues, and the spans are lost.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.role_table import ROLES
from rlhf.tracking.run_folder.atomic import append_whole

logger = logging.getLogger(__name__)

_ROWS = ("controller", *ROLES)  # from top to bottom
_REMEMBERED = 256  # newest spans of a lane, for the overlap check


class Timeline:
    """An open trace (JSON array of events, the Chrome trace format). Thread-safe.

    Invariant: spans of one lane nest or are disjoint, as the format demands.
    """

    def __init__(self, path: Path) -> None:
        self._guard = threading.Lock()
        self._pids: dict[str, int] = {}
        self._lanes: dict[tuple[str, str], list[deque[tuple[float, float]]]] = {}
        self._tids: dict[tuple[int, str], int] = {}
        self._file = path.open("ab", buffering=0)
        end, known = _readable_end(path)
        for event in known:
            if event["name"] == "process_name":
                self._pids[event["args"]["name"]] = event["pid"]
            elif event["name"] == "thread_name":
                self._tids[event["pid"], event["args"]["name"]] = event["tid"]
        self._file.truncate(end)
        self._empty = end == 0
        self._lost = 0  # events since the last written event

    @contextmanager
    def span(
        self, name: str, role: str = "controller", *, lane: str = "main", **args: int | float | str
    ) -> Generator[None]:
        """Record the time spent inside, also after an exception."""
        start_s = time.time()
        try:
            yield
        finally:
            self.record(name, role, start_s=start_s, end_s=time.time(), lane=lane, args=args)

    def record(
        self,
        name: str,
        role: str,
        *,
        start_s: float,
        end_s: float,
        lane: str = "main",
        args: Mapping[str, int | float | str] | None = None,
    ) -> None:
        """Add a span by wall-clock ends (time.time(), to fit spans of several processes)."""
        with self._guard:
            pid = self._pid(role)
            tid = self._tid(pid, self._free_lane(role, lane, start_s, end_s))
            start_us = round(start_s * 1e6)
            event = {"name": name, "ph": "X", "ts": start_us, "dur": round(end_s * 1e6) - start_us}
            self._write({**event, "pid": pid, "tid": tid, **({"args": dict(args)} if args else {})})

    def close(self) -> None:
        """End the array: the file is then strict JSON."""
        with self._guard:
            if not self._file.closed:
                self._put(b"[\n]\n" if self._empty else b"\n]\n")
                try:
                    self._file.close()
                except OSError as error:  # NFS reports failed writes here
                    logger.warning("%s could not be written to its end: %s", self._file.name, error)

    def _pid(self, role: str) -> int:
        if role not in self._pids:
            known = _ROWS.index(role) + 1 if role in _ROWS else None
            pid = known or max([len(_ROWS), *self._pids.values()]) + 1
            named = self._write({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": role}})
            self._write({"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}})
            if not named:
                return pid
            self._pids[role] = pid
        return self._pids[role]

    def _tid(self, pid: int, lane: str) -> int:
        if (pid, lane) not in self._tids:
            tid = 1 + sum(1 for other, _ in self._tids if other == pid)
            if not self._write({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": lane}}):
                return tid
            self._tids[pid, lane] = tid
        return self._tids[pid, lane]

    def _free_lane(self, role: str, lane: str, start: float, end: float) -> str:
        """Add a span to the lane's first copy in which all spans nest or are disjoint. Return the copy's name."""
        lanes = self._lanes.setdefault((role, lane), [])
        fits = (
            all(end <= s or e <= start or start <= s <= e <= end or s <= start <= end <= e for s, e in taken)
            for taken in (*lanes, ())
        )
        number = next(number for number, is_fitting in enumerate(fits) if is_fitting)
        if number == len(lanes):
            lanes.append(deque(maxlen=_REMEMBERED))
        lanes[number].append((start, end))
        return f"{lane} {number + 1}" if number else lane

    def _write(self, event: Mapping[str, Any]) -> bool:
        text = (b"[\n" if self._empty else b",\n") + json.dumps(event, allow_nan=False).encode()
        is_written = self._put(text)
        self._empty = self._empty and not is_written
        return is_written

    def _put(self, text: bytes) -> bool:
        """Write at the end of the whole events, to the kernel, safe from the process's death. Return the success."""
        try:
            append_whole(self._file.fileno(), text, is_synced=False)
        except OSError as error:
            if not self._lost:
                logger.warning(
                    "%s could not be written, and events are lost until a write succeeds: %s", self._file.name, error
                )
            self._lost += 1
            return False
        if self._lost:
            logger.warning("%s continues, without %d events", self._file.name, self._lost)
        self._lost = 0
        return True


def _readable_end(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the position after the last whole event of an earlier trace, and the metadata events."""
    end, position, names = 0, 0, []
    with path.open("rb") as file:
        for line in file:
            text = line.rstrip(b",\n")
            whole = text.startswith(b"{") and text.endswith(b"}")
            if whole and b'"ph": "M"' in text:
                names.append(json.loads(text))
            if whole and (line.endswith(b"\n") or _is_json(text)):
                end = position + len(text)
            position += len(line)
    return end, names


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
