"""Choose a process of a run by role and rank, wait for a stage of the run's timeline, and end or stop the process.

The processes come from processes.json. A span is written at its end. So a stage is known to begin when the previous
span ends, plus a moment as in earlier steps. Afterwards the timeline proves whether the fault hit its stage.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from actors.cluster.heartbeat import own_oom_kills
from rlhf.role_table import Role

How = Literal["kill", "stop", "memory"]
Helper = Literal["code", "conversation", "raylet"]
POLL_S = 0.005
NEWEST = 200  # spans from which the beginning of a stage is predicted
EARLIER = 5  # occurrences of the stage used for it
DEPTH = 0.25  # share of a stage's work at which a fault comes


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A process to hit. who: the process's name in processes.json. helper: the kind of that process's child
    which is the victim. recovers: the role that records the recovery. None: the run repairs the loss without one."""

    who: str
    helper: Helper | None = None
    recovers: Role | Literal["controller"] | None = None

    @property
    def ends_driver(self) -> bool:
        """Return whether the driver ends too, so that the run needs --supervise."""
        return self.recovers == "controller"


VICTIMS: Mapping[str, Victim] = {
    "engine": Victim(who="rollout rank 0", recovers="rollout"),
    "policy rank 0": Victim(who="policy rank 0", recovers="policy"),
    "policy rank 1": Victim(who="policy rank 1", recovers="policy"),
    "critic": Victim(who="critic rank 0", recovers="critic"),
    "reference": Victim(who="reference rank 0", recovers="reference"),
    "reward worker": Victim(who="reward rank 0", recovers="reward"),
    "reward process": Victim(who="reward rank 0", helper="code"),
    "conversation": Victim(who="rollout rank 0", helper="conversation"),
    "environment": Victim(who="rollout rank 0", helper="code", recovers="rollout"),
    "object store": Victim(who="driver", helper="raylet", recovers="controller"),
    "driver": Victim(who="driver", recovers="controller"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The beginning of a stage: a span of a name has ended. keeps: whether an evaluation and a checkpoint end this
    step. None: either. awaits_rollouts: the rollouts of a batch ahead have ended too."""

    after: str
    keeps: bool | None = None
    awaits_rollouts: bool = False


KEEPS_EVERY = 2  # steps
MOMENTS: Mapping[str, Moment] = {
    "rollouts": Moment(after="step", keeps=False),
    "experience": Moment(after="rollouts"),
    "update": Moment(after="experience"),
    "weight_sync": Moment(after="update", awaits_rollouts=True),
    "eval": Moment(after="step", keeps=True),
    "checkpoint": Moment(after="eval"),
}
STAGES = (*MOMENTS, "export")
ONE_BY_ONE = {*MOMENTS, "step"} - {"rollouts"}  # these spans do not overlap, but a step contains some
STEP_ENDS = {"step", "eval", "checkpoint"}  # spans that may end a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A cell of the matrix."""

    mode: str
    who: str
    when: str
    how: How

    def __str__(self) -> str:
        return f"{self.mode}: {self.how} {self.who} in {self.when}"

    @property
    def recovers(self) -> str | None:
        """Return the role whose recoveries count the fault. In an export only the policy and the driver work."""
        role = VICTIMS[self.who].recovers
        return role if self.when != "export" or role in ("policy", "controller") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedSpan:
    """A span of timeline.json, in seconds of the wall clock."""

    name: str
    role: str
    start_s: float
    end_s: float


class TimelineTail:
    """The spans in the timeline of a run so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans: list[EndedSpan] = []
        self._counts: Counter[str] = Counter()
        self._roles: dict[int, str] = {}
        self._end = 0  # of the last event

    def read(self) -> list[EndedSpan]:
        """Return all spans, and read the new spans since the last call."""
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
        self.read()
        return self._counts[name]

    def recoveries(self) -> Mapping[str, int]:
        return Counter(span.role for span in self.read() if span.name == "recovery")

    def seconds_back(self, at: float, role: str) -> float | None:
        """Return the seconds from a time until a recovery of the role had ended. None: there was none."""
        ends = [span.end_s - at for span in self.read() if (span.name, span.role) == ("recovery", role)]
        return min((seconds for seconds in ends if seconds > 0.0), default=None)

    def delay(self, when: str) -> float:
        """Return the seconds from the moment of a stage until the middle of the stage's work, as in the last
        few steps.
        """
        spans, found = self.read()[-NEWEST:], []
        for place, before in enumerate(spans):
            if before.name == MOMENTS[when].after:
                # Rollouts may overlap all stages of a step. Rollouts after an evaluation begin later than others.
                ends = {"step", "eval"} if when == "rollouts" else ONE_BY_ONE
                later = (span for span in spans[place + 1 :] if span.name in {when, *ends})
                own = next(later, None)
                if own is not None and own.name == when and own.end_s > before.end_s:
                    since_s, between = before.end_s, spans[place + 1 : spans.index(own)]
                    if MOMENTS[when].awaits_rollouts:
                        since_s = max([since_s, *(span.end_s for span in between if span.name == "rollouts")])
                    begins_s = max(own.start_s, since_s)
                    found.append(begins_s - since_s + DEPTH * (own.end_s - begins_s))
        return statistics.median_low(found[-EARLIER:]) if found else 0.0

    def has_rollouts(self) -> bool:
        """Return whether rollouts have ended since the last step."""
        ended = (span.name for span in reversed(self.read()) if span.name in {"rollouts", *STEP_ENDS})
        return next(ended, None) == "rollouts"

    def is_kept(self) -> bool:
        """Return whether an evaluation and a checkpoint follow the last step. A checkpoint begins the count again."""
        count = 0
        for span in reversed(self.read()):
            if span.name == "checkpoint" or (span.name, span.role) == ("recovery", "controller"):
                break
            count += span.name == "step"
        return count % KEEPS_EVERY == 0

    def was_in(self, fault: Fault, at: float) -> bool:
        """Return whether the run was in a fault's stage at a time. A dead driver has not written the stage's span."""
        if VICTIMS[fault.who].ends_driver:
            moment = MOMENTS[fault.when].after
            # Rollouts may overlap all stages of a step.
            ends = {"rollouts", *STEP_ENDS} if fault.when == "rollouts" else {moment, *ONE_BY_ONE}
            ended = [span for span in self.read() if span.name in ends and span.end_s <= at]
            return bool(ended) and max(ended, key=lambda span: span.end_s).name == moment
        return any(span.name == fault.when and span.start_s <= at <= span.end_s for span in self.read())

    def _add(self, event: Mapping[str, Any]) -> None:
        if event.get("name") == "process_name":
            self._roles[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "X":
            start = event["ts"] / 1e6
            role = self._roles[event["pid"]]
            self._counts[event["name"]] += 1
            self.spans.append(EndedSpan(name=event["name"], role=role, start_s=start, end_s=start + event["dur"] / 1e6))


class FeignedMemory:
    """A simulated count of the kernel's kills for lack of memory, for a single run. The run has a separate mount
    namespace with a file of the test over the kernel's file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "oom_kills"
        self.count = 0
        self._write()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command to run another command with the simulated count."""
        kernels = own_oom_kills()
        assert kernels is not None
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(self.file), kernels.path, *command]

    def add(self) -> None:
        self.count += 1
        self._write()

    def _write(self) -> None:
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, f"oom_kill {self.count:06d}\n".encode(), 0)  # in one write, and in the mounted file itself
        finally:
            os.close(file)


def can_feign_memory() -> bool:
    return os.geteuid() == 0 and shutil.which("unshare") is not None and own_oom_kills() is not None


def listed_processes(run: Path) -> dict[str, int]:
    """Return the pids of a running run by name, such as `policy rank 1`."""
    with suppress(FileNotFoundError):
        return {row["who"]: row["pid"] for row in json.loads((run / "processes.json").read_text(encoding="utf-8"))}
    return {}


def find_victim(run: Path, victim: Victim) -> psutil.Process | None:
    """Return the process. None: the process does not run now."""
    pid = listed_processes(run).get(victim.who)
    with suppress(psutil.NoSuchProcess):
        process = None if pid is None else psutil.Process(pid)
        if process is None or victim.helper is None:
            return process
        return next(_helpers(process, victim.helper), None)
    return None


def _helpers(process: psutil.Process, kind: Helper) -> Iterator[psutil.Process]:
    """Yield the processes with a user's code, the processes of conversations, or the daemon with the object store."""
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            if kind == "raylet" and child.name() == kind:
                yield child
            elif kind != "raylet" and child.cmdline()[1:3] == ["-u", "-c"]:
                # The engine's child is the parent of the process with an environment's code.
                for code in child.children() if "rlhf.rollouts.environments" in child.cmdline()[3] else [child]:
                    yield from code.children() if kind == "conversation" else [code]


def wait_until(
    condition: Callable[[], bool], is_over: Callable[[], bool], *, limit_s: float, poll_s: float = POLL_S
) -> bool:
    """Wait for the condition. Return False if the run ended or the limit passed before."""
    until = time.monotonic() + limit_s
    while not condition():
        if is_over() or time.monotonic() > until:
            return condition()
        time.sleep(poll_s)
    return True


def is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def strike(process: psutil.Process, how: How, memory: FeignedMemory | None) -> float | None:
    """Apply a fault to a process, and return the time of the wall clock. None: the process had ended before."""
    now = time.time()
    if how == "memory":
        assert memory is not None
        memory.add()
    try:
        process.send_signal(signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    except psutil.NoSuchProcess:
        return None
    return now
