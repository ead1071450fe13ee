"""Choose a process of a run by role and rank, wait for a moment of the run's timeline, and send a signal.

The processes come from processes.json. A span is written when it ends, so a stage of a run in turns begins when the
span before it ends. Nothing here waits for a fixed time.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from rlhf.role_table import Role

How = Literal["kill", "stop"]
Helper = Literal["code", "conversation", "raylet"]
SIGNALS: Mapping[How, signal.Signals] = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A process of a run.

    who: its name in processes.json. helper: the victim is a process that this one has started. recovers: the role
    whose recoveries the loss counts among. None: the loss is made good without a recovery.
    """

    who: str
    helper: Helper | None = None
    recovers: Role | Literal["controller"] | None = None
    is_supervised: bool = False  # the run is started with --supervise


VICTIMS: Mapping[str, Victim] = {
    "engine": Victim(who="rollout rank 0", recovers="rollout"),
    "policy rank 0": Victim(who="policy rank 0", recovers="policy"),
    "policy rank 1": Victim(who="policy rank 1", recovers="policy"),
    "critic": Victim(who="critic rank 0", recovers="critic"),
    "reference": Victim(who="reference rank 0", recovers="reference"),
    "reward worker": Victim(who="reward rank 0", recovers="reward"),
    "reward process": Victim(who="reward rank 0", helper="code"),
    "conversation": Victim(who="rollout rank 0", helper="conversation"),
    "object store": Victim(who="driver", helper="raylet", recovers="controller", is_supervised=True),
    "driver": Victim(who="driver", recovers="controller", is_supervised=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedSpan:
    """A span of timeline.json, in seconds of the wall clock."""

    name: str
    role: str
    start_s: float
    end_s: float


class TimelineTail:
    """The spans that a run has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans: list[EndedSpan] = []
        self._roles: dict[int, str] = {}
        self._end = 0  # of the last event

    def read(self) -> list[EndedSpan]:
        """Return all spans, and read those that are new since the last call."""
        if not self.path.exists():
            return self.spans
        with self.path.open("rb") as file:
            file.seek(self._end)
            position = self._end
            for line in file:
                text = line.rstrip(b",\n")
                try:
                    event = json.loads(text) if text.startswith(b"{") else None
                except ValueError:  # the event is half written
                    break
                if event is not None:
                    self._end = position + len(text)  # a resumed run continues here
                    self._add(event)
                position += len(line)
        return self.spans

    def count(self, name: str) -> int:
        """Return the number of spans of a name."""
        return sum(span.name == name for span in self.read())

    def _add(self, event: Mapping[str, Any]) -> None:
        if event.get("name") == "process_name":
            self._roles[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "X":
            start = event["ts"] / 1e6
            role = self._roles[event["pid"]]
            self.spans.append(EndedSpan(name=event["name"], role=role, start_s=start, end_s=start + event["dur"] / 1e6))


def listed_processes(run: Path) -> dict[str, int]:
    """Return the pids of a running run by name, such as `policy rank 1`."""
    with suppress(FileNotFoundError):
        return {row["who"]: row["pid"] for row in json.loads((run / "processes.json").read_text(encoding="utf-8"))}
    return {}


def find_victim(run: Path, victim: Victim) -> psutil.Process | None:
    """Return the process. None: it does not run now."""
    pid = listed_processes(run).get(victim.who)
    with suppress(psutil.NoSuchProcess):
        process = None if pid is None else psutil.Process(pid)
        if process is None or victim.helper is None:
            return process
        return next(_helpers(process, victim.helper), None)
    return None


def _helpers(process: psutil.Process, kind: Helper) -> Iterator[psutil.Process]:
    """Yield the processes with a user's code, those of single conversations, or the daemon with the object store."""
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            is_helper = child.name() == kind if kind == "raylet" else child.cmdline()[1:3] == ["-u", "-c"]
            if is_helper:
                yield from child.children() if kind == "conversation" else [child]


def wait_until(
    condition: Callable[[], bool], is_over: Callable[[], bool], *, limit_s: float, poll_s: float = POLL_S
) -> bool:
    """Wait until the condition holds, and return whether it did before the run was over or the limit passed."""
    until = time.monotonic() + limit_s
    while not condition():
        if is_over() or time.monotonic() > until:
            return condition()
        time.sleep(poll_s)
    return True


def inject(run: Path, victim: Victim, how: How, is_over: Callable[[], bool], *, limit_s: float = 20.0) -> float | None:
    """Send the signal as soon as the process runs, and return the time of the wall clock. None: it did not run."""
    found: list[psutil.Process] = []

    def look() -> bool:
        process = find_victim(run, victim)
        found[:] = [] if process is None else [process]
        return bool(found)

    if not wait_until(look, is_over, limit_s=limit_s):
        return None
    now = time.time()
    try:
        found[0].send_signal(SIGNALS[how])
    except psutil.NoSuchProcess:
        return None
    return now
