"""Run a small training run as a child process, inject faults, and compare the run with a run without faults.

The tiny model in float32 on Ray, vLLM and DeepSpeed: two policy ranks, a critic, a reference, a reward worker with a
process for the reward's code, and an engine. A run gets its faults in turn: each after the run has recovered from the
previous fault and trained a step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import psutil

from rlhf.cli import main
from rlhf.role_table import ROLES
from tests.chaos.command import FILE
from tests.chaos.faults import (
    KEEPS_EVERY,
    MOMENTS,
    POLL_S,
    VICTIMS,
    Fault,
    FeignedMemory,
    How,
    TimelineTail,
    find_victim,
    is_running,
    strike,
    wait_until,
)
from tests.integration.recipes import ONLINE, merge, rows, without_clocks, write_config

COMMAND = (sys.executable, "-m", "tests.chaos.command")
LIMIT_S = 400.0  # limit for a run without faults, or for a step, on a busy machine
BACK_WITHIN_S = 200.0  # a driver stopped for a minute is given up
GONE_WITHIN_S = 60.0
LOOK_EVERY_S = 5.0
SHORT_POLL_S = 0.001  # between looks at an export, which takes a tenth of a second
TRIES = 6  # attempts for a fault that misses its stage
FIRST_STEPS = 2  # without a fault
SHM = Path("/dev/shm")
NEWEST_BYTES = 1 << 16  # bytes at the end of metrics.jsonl, more than a row has
KINDS: Mapping[How, str] = {"kill": "died", "stop": "hung", "memory": "out_of_memory"}
ROLE_OF_SOURCE: Mapping[str, str] = {**{role: role for role in ROLES}, "driver": "controller"}
REWARD = """
import os
import time
from pathlib import Path

def reward(prompt, response):
    time.sleep(0.01)  # so that rollouts last some tenths of a second
    Path(__file__).with_name(f"scored.{os.getpid()}").touch()
    return float(len(response) % 3)
"""
THREAD = {"threads": 1}

BASE: Mapping[str, Any] = merge(
    ONLINE,
    {
        "algorithm": {"name": "ppo", "critic_lr": 1e-3, "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"}},
        "rollouts": {"max_new_tokens": 16},
        "rewards": {"mine": {"function": "mine.py:reward"}},
        "train": {"lr": 1e-5, "checkpoint_every": KEEPS_EVERY},  # the policy of many steps still answers at length
        "eval": {"every": KEEPS_EVERY, "at_start": False},
        "cluster": {
            "call_timeout_s": 60.0,
            "heartbeat_timeout_s": 10.0,
            "restarts": {"engine": 1000, "gang": 1000, "worker": 1000},
            "roles": {
                "policy": {"workers": 2, "cpus": 0.5, **THREAD},
                "critic": THREAD,
                "reference": THREAD,
                "reward": THREAD,
                "rollout": {"cpus": 0.5, **THREAD},
            },
        },
    },
)
GAME: Mapping[str, Any] = {
    "data": {
        "train": {"task": "guessing_game", "split": "train", "size": 64},
        "eval": {"task": "guessing_game", "split": "eval", "size": 8},
        "apply_chat_template": None,
    },
    "reward_policy": {"on_error": "drop"},
    "rollouts": {
        "max_new_tokens": 6,
        "environment": {"name": "guess_number", "args": {"low": 1, "high": 7}, "max_turns": 3, "max_tokens": 96},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A mode of training, and the values that a run with a fault shares with an unbroken run."""

    promise: Literal["bits", "each prompt once"]
    changes: Mapping[str, Any]


CORRECTED = {"algorithm": {"correction": {"preset": "token_tis"}}, "rollouts": {"max_staleness": 2}}
MODES: Mapping[str, Mode] = {
    "in turns": Mode(promise="bits", changes={}),
    "pipelined": Mode(promise="bits", changes=CORRECTED),
    "in flight": Mode(
        promise="each prompt once", changes=merge(CORRECTED, {"rollouts": {"weight_updates": "in_flight"}})
    ),
    "conversations": Mode(promise="each prompt once", changes=GAME),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a fault. back_s: from the signal until the work continued. None: no recovery was visible."""

    fault: Fault
    back_s: float | None
    contradictions: Sequence[str]


def run_config(folder: Path, mode: str, *, steps: int, changes: Mapping[str, Any] = {}) -> Path:
    """Write the configuration of a run in FOLDER/run, and return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    tree = merge(merge(merge(BASE, MODES[mode].changes), changes), {"train": {"steps": steps}})
    return write_config(folder / "run.yaml", {"run": {"name": "run", "dir": str(folder), "seed": 3}}, tree)


def with_model(folder: str) -> Mapping[str, Any]:
    """Return the changes to a configuration for GRPO on the model of a folder, with smaller batches."""
    return {
        "policy": {"model": str(Path(folder).absolute())},
        "algorithm": {"name": "grpo", "critic_lr": None, "kl": None},
        "cluster": {"roles": {"critic": None, "reference": None}},
        "data": {"eval": {"size": 4}, "max_prompt_tokens": 64},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "train": {"sequences_per_update": 4},
    }


class Footprint:
    """The processes of a run, and the files in /dev/shm mapped or opened by these processes until now.

    An inherited variable marks the processes of the run, or a session with such a process: Ray overwrites the
    environment of workers with their titles.
    """

    def __init__(self) -> None:
        self.variable = f"CHAOS_RUN={secrets.token_hex(8)}"
        self.sessions: set[int] = set()
        self.files: set[Path] = set()

    def start(self, config: Path, *arguments: str, memory: FeignedMemory | None = None) -> subprocess.Popen[str]:
        """Start the run. The output is written beside the configuration."""
        name, _, value = self.variable.partition("=")
        command = [*COMMAND, "train", str(config), "--quiet", *arguments]
        with config.with_suffix(".log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                command if memory is None else memory.command(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **noting_groups(config), name: value},
            )

    def processes(self) -> list[psutil.Process]:
        others, found = [], []
        for pid in psutil.pids():
            with suppress(OSError, psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                is_marked = self.variable.encode() in Path(f"/proc/{pid}/environ").read_bytes()
                (found if is_marked else others).append(process)
        self.sessions.update(_sessions(found))
        return found + [process for process in others if self.sessions.intersection(_sessions([process]))]

    def look(self) -> None:
        for process in self.processes():
            with suppress(OSError):
                folder = Path(f"/proc/{process.pid}")
                lines = (folder / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
                paths = [line[line.index(f"{SHM}/") :] for line in lines if f" {SHM}/" in line]
                for link in (folder / "fd").iterdir():
                    with suppress(OSError):
                        paths.append(str(link.readlink()))
                is_there = (path for path in paths if path.startswith(f"{SHM}/") and not path.endswith("(deleted)"))
                self.files.update(Path(path) for path in is_there)

    @contextmanager
    def followed(self) -> Iterator[None]:
        over = threading.Event()

        def follow() -> None:
            while not over.wait(LOOK_EVERY_S):
                self.look()

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def left(self) -> list[str]:
        """Wait for the end of the processes, and return the processes and files left behind."""
        wait_until(lambda: not self.processes(), lambda: False, limit_s=GONE_WITHIN_S, poll_s=0.5)
        lines = [f"{path} is left" for path in sorted(self.files) if path.exists()]
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                lines.append(f"process {process.pid} is left: {' '.join(process.cmdline())[:120]}")
        return lines

    def kill(self) -> None:
        found = self.processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=GONE_WITHIN_S)


def _sessions(processes: Iterable[psutil.Process]) -> Iterator[int]:
    for process in processes:
        with suppress(ProcessLookupError):
            yield os.getsid(process.pid)


def survive(
    folder: Path,
    faults: Sequence[Fault],
    unbroken: Path | None,
    *,
    steps: int,
    changes: Mapping[str, Any] = {},
    told: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Start a run, inject faults in turn, wait for the end of the run, and check all promises.

    A broken promise of the whole run counts against each fault of the run.

    Args:
        unbroken: the folder of the same run without a fault. None: the mode promises no equal bits.
        told: is called with each outcome at once.
    """
    run, outcomes = FaultyRun(folder, faults, steps=steps, changes=changes), list[Outcome]()
    with run.footprint.followed():
        try:
            for outcome in run.inject_all(faults):
                outcomes.append(outcome)
                told(outcome)
                if outcome.contradictions:
                    break
            code = wait_for_end(run.process, LIMIT_S + steps)
        finally:
            if not run.is_over():
                run.footprint.kill()
    bad = [f"exit code {code}: {said(run.config)}"] if code != 0 else []
    bad += contradictions(run.folder, unbroken) + run.unrecorded() if code == 0 else []
    bad += groups_left(run.config) if code == 0 and not run.loses_driver else []
    bad += run.footprint.left()
    for fault in faults[len(outcomes) :]:
        outcomes.append(Outcome(fault=fault, back_s=None, contradictions=["it was not injected after another one"]))
    return [replace(outcome, contradictions=[*outcome.contradictions, *bad]) for outcome in outcomes]


class FaultyRun:
    """A run in progress for the injection of faults."""

    def __init__(self, folder: Path, faults: Sequence[Fault], *, steps: int, changes: Mapping[str, Any]) -> None:
        """Start the run, under --supervise if a fault ends the driver."""
        self.config = run_config(folder, faults[0].mode, steps=steps, changes=changes)
        self.folder = folder / "run"
        self.tail = TimelineTail(self.folder / "timeline.json")
        self.footprint = Footprint()
        self.losses: Counter[tuple[str, str]] = Counter()  # losses by role and kind; each must have been recovered
        self.loses_driver = any(VICTIMS[fault.who].ends_driver for fault in faults)
        self.memory = FeignedMemory(folder) if any(fault.how == "memory" for fault in faults) else None
        arguments = ["--supervise"] if self.loses_driver else []
        self.process = self.footprint.start(self.config, *arguments, memory=self.memory)
        self._struck_at_step = FIRST_STEPS - 1

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def inject_all(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """Inject faults in turn, but all faults without an effect on an export together. Yield the outcomes."""
        for is_unnoticed, group in groupby(faults, key=lambda fault: fault.when == "export" and fault.recovers is None):
            some = list(group)
            yield from self._inject_unnoticed(some) if is_unnoticed else map(self.inject, some)

    def _inject_unnoticed(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """End all processes without work in the export at once, since the export is short."""
        known: list[psutil.Process] = []

        def look() -> bool:
            found = [find_victim(self.folder, VICTIMS[fault.who]) for fault in faults]
            known[:] = [process for process in found if process is not None]
            return len(known) == len(faults)

        is_hit = self._wait(look) and self._wait(self._exports, poll_s=SHORT_POLL_S)
        struck = [strike(process, "kill", None) for process in known] if is_hit else []
        is_hit = is_hit and None not in struck and self._exports()
        for place, fault in enumerate(faults):
            bad = self._still_running(known[place]) if is_hit else ["it was not injected"]
            yield Outcome(fault=fault, back_s=None, contradictions=bad)

    def inject(self, fault: Fault) -> Outcome:
        """Inject a fault, and wait until the run is back at work. Repeat a fault that has missed its stage."""
        back_s, bad = None, ["it missed its stage"]
        for _ in range(TRIES):
            process = self._victim_at_its_moment(fault)
            at = None if process is None else strike(process, fault.how, self.memory)
            if process is not None and at is None and VICTIMS[fault.who].helper == "conversation":
                continue  # the victim's conversation ended by itself
            if process is None or at is None:
                return Outcome(fault=fault, back_s=None, contradictions=["it was not injected"])
            self._struck_at_step = steps_done(self.folder)
            back_s, bad = self._recovery(fault, at, process)
            if VICTIMS[fault.who].ends_driver:  # without Ray the run trains on for two seconds
                self._struck_at_step = max(self._struck_at_step, last_death(self.folder))
            if bad or self._has_hit(fault, at):
                return Outcome(fault=fault, back_s=back_s, contradictions=bad)
        return Outcome(fault=fault, back_s=back_s, contradictions=[f"it missed its stage {TRIES} times"])

    def unrecorded(self) -> list[str]:
        """Return the losses missing in the records. A resumed run may lack some records."""
        roles = Counter[str]()
        for (role, _), count in self.losses.items():
            roles[role] += count
        seen = self.tail.recoveries()
        bad = [] if seen == roles else [f"the timeline has the recoveries {dict(seen)}, expected {dict(roles)}"]
        if not self.loses_driver or set(roles) == {"controller"}:
            found, late = recorded_losses(self.folder), Counter[str]()
            for (role, _), count in recorded_losses(self.folder, after=steps_done(self.folder)).items():
                late[role] += count  # in the export, after the last row
            bad += [] if found == self.losses else [f"errors.jsonl has {dict(found)}, expected {dict(self.losses)}"]
            for role, count in roles.items():
                total, expected = counted(self.folder, role), count - late[role]
                if total != expected:
                    bad.append(f"recovery/{role}/total is {total:g} in all rows together, expected {expected}")
        return bad

    def _victim_at_its_moment(self, fault: Fault) -> psutil.Process | None:
        """Wait for the stage of a fault, and return the process to hit. None: the run has ended before."""
        victim, known = VICTIMS[fault.who], list[psutil.Process]()

        def look() -> bool:
            process = known[0] if known and is_running(known[0]) else find_victim(self.folder, victim)
            known[:] = [] if process is None else [process]
            return process is not None

        if fault.when == "export":
            is_there = self._wait(look) and self._wait(self._exports, poll_s=SHORT_POLL_S)
        else:
            is_there = self._wait(lambda: steps_done(self.folder) > self._struck_at_step)
            is_there = is_there and self._wait_for_stage(fault, look)
        return known[0] if is_there and self._wait(look) else None

    def _wait_for_stage(self, fault: Fault, look: Callable[[], bool]) -> bool:
        moment = MOMENTS[fault.when]
        while True:
            seen, delay_s = self.tail.count(moment.after), self.tail.delay(fault.when)
            look()
            if not self._wait(lambda seen=seen: self.tail.count(moment.after) > seen):
                return False
            if moment.keeps in (None, self.tail.is_kept()):
                if moment.awaits_rollouts and not self._wait(self.tail.has_rollouts):
                    return False
                time.sleep(delay_s)
                return True

    def _recovery(self, fault: Fault, at: float, process: psutil.Process) -> tuple[float | None, list[str]]:
        role, bad = fault.recovers, list[str]()
        if role is not None:
            is_back = self._wait(lambda: self.tail.seconds_back(at, role) is not None, limit_s=BACK_WITHIN_S)
            if is_back or fault.when != "export" or not self.is_over():  # else its export was done
                self.losses[role, KINDS[fault.how]] += 1
                bad += [] if is_back else [f"no recovery of {role} within {BACK_WITHIN_S:g} s"]
        bad += self._still_running(process)
        if role is None and not self._wait(lambda: self._is_replaced(fault, process), limit_s=BACK_WITHIN_S):
            bad.append(f"no {fault.who} has taken the place of process {process.pid}")
        back_s = None if role is None else self.tail.seconds_back(at, role)
        return back_s, bad

    def _is_replaced(self, fault: Fault, process: psutil.Process) -> bool:
        """Return whether another process does the work of a lost process.

        A reward process begins with the response of the lost process. A second death becomes the response's error and
        ends the run, so no fault may come before the new process has scored.
        """
        successor = find_victim(self.folder, VICTIMS[fault.who])
        if successor is None or successor == process:
            return False
        scored = self.config.with_name(f"scored.{successor.pid}")
        return VICTIMS[fault.who].helper != "code" or scored.exists()

    def _still_running(self, process: psutil.Process) -> list[str]:
        """Wait for the end of a process after its fault. Return a message if the process still runs."""
        is_gone = self._wait(lambda: not is_running(process), limit_s=GONE_WITHIN_S)
        return [] if is_gone else [f"process {process.pid} still runs"]

    def _exports(self) -> bool:
        return any(self.folder.glob(f".own-*/{self.folder.name}-final"))

    def _has_hit(self, fault: Fault, at: float) -> bool:
        if fault.when == "export":
            return True  # the run has begun the folder of the final model
        seen = steps_done(self.folder)

        def is_known() -> bool:
            ends = any(span.name == fault.when and span.end_s >= at for span in self.tail.read())
            return ends or VICTIMS[fault.who].ends_driver or steps_done(self.folder) > seen + KEEPS_EVERY

        self._wait(is_known)
        return self.tail.was_in(fault, at)

    def _wait(self, condition: Callable[[], bool], *, limit_s: float = LIMIT_S, poll_s: float = POLL_S) -> bool:
        return wait_until(condition, self.is_over, limit_s=limit_s, poll_s=poll_s)


def groups_left(config: Path) -> list[str]:
    """Return the placement groups left when a run disconnects from Ray. A supervised driver records none."""
    states: Mapping[str, str] = json.loads(_groups_file(config).read_text(encoding="utf-8"))
    left = [f"placement group {name} is {state}" for name, state in states.items() if state != "REMOVED"]
    return left if states else ["the run had no placement group"]


def noting_groups(config: Path) -> Mapping[str, str]:
    return {FILE: str(_groups_file(config))}


def _groups_file(config: Path) -> Path:
    return config.with_suffix(".groups")


def wait_for_end(process: subprocess.Popen[str], limit_s: float) -> int | None:
    """Return the exit code of a run. None: the run did not end within the limit."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=limit_s)
    return None


def said(config: Path) -> str:
    return config.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


def steps_done(run: Path) -> int:
    """Return the last step with a whole row."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - NEWEST_BYTES, 0))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def contradictions(run: Path, unbroken: Path | None) -> list[str]:
    bad = [] if main(["doctor", str(run)]) == 0 else ["rlhf doctor finds contradictions"]
    if not (run / "final").is_dir():
        return [*bad, "there is no final model"]
    if unbroken is None:
        return bad
    for row, other in zip(without_clocks(rows(run)), without_clocks(rows(unbroken)), strict=True):
        names = sorted(key for key in {**row, **other} if row.get(key) != other.get(key))
        bad += [f"step {row['step']}: {key} is {row.get(key)}, expected {other.get(key)}" for key in names]
    return bad if weights_hash(run) == weights_hash(unbroken) else [*bad, "the final weights differ"]


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def recorded_losses(run: Path, *, after: int = -1) -> Counter[tuple[str, str]]:
    """Return the number of losses in errors.jsonl after a step, by role and kind."""
    path = run / "errors.jsonl"
    errors = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    later = [error for error in errors if error["step"] > after]
    known = [error for error in later if (error["source"] or "").partition(" ")[0] in ROLE_OF_SOURCE]
    return Counter((ROLE_OF_SOURCE[error["source"].partition(" ")[0]], error["kind"]) for error in known)


def last_death(run: Path) -> int:
    """Return the step after which the driver died last. A second death after the same step would end the run."""
    lines = (run / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    found = [re.search(r"after step (\d+)", error["message"]) for error in map(json.loads, lines)]
    return int(next((match[1] for match in reversed(found) if match is not None), 0))


def counted(run: Path, role: str) -> float:
    return sum(row.get(f"recovery/{role}/total", 0.0) for row in rows(run))


def unrecorded(run: Path, role: str) -> list[str]:
    total = counted(run, role)
    bad = [] if total == 1.0 else [f"recovery/{role}/total is {total:g} in all rows together, expected 1"]
    return bad if recorded_losses(run) else [*bad, "errors.jsonl does not name the loss"]


def train_unbroken(folder: Path, mode: str, *, steps: int, changes: Mapping[str, Any] = {}) -> Path:
    config, footprint = run_config(folder, mode, steps=steps, changes=changes), Footprint()
    code = wait_for_end(footprint.start(config), LIMIT_S + steps)
    footprint.kill()
    assert code == 0, said(config)
    return folder / "run"
