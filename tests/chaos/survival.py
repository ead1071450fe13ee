"""Run a small training run as a child process, inject one fault, and compare the run with one without faults.

The tiny model in float32 on Ray, vLLM and DeepSpeed: two policy ranks, a critic, a reference, a reward worker with a
process for the reward's code, and an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from rlhf.cli import main
from tests.chaos.faults import VICTIMS, How, TimelineTail, inject, wait_until
from tests.integration.recipes import merge, rlhf, rows, without_clocks, write_config

LIMIT_S = 240.0  # for a run with a fault
GONE_WITHIN_S = 60.0
SHM = Path("/dev/shm")
REWARD = "def reward(prompt, response):\n    return float(len(response) % 3)\n"
THREAD = {"threads": 1}

BASE: Mapping[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "algorithm": {"name": "ppo", "critic_lr": 1e-3, "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"}},
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 64},
        "eval": {"task": "running_totals", "split": "eval", "size": 16},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 16},
    "rewards": {"mine": {"function": "mine.py:reward"}},
    "train": {
        "steps": 4,
        "lr": 1e-3,
        "sequences_per_update": 16,
        "max_tokens_per_microbatch": 256,
        "checkpoint_every": 2,
    },
    "eval": {"every": 2, "at_start": False},
    "cluster": {
        "object_store_gib": 0.25,
        "start_timeout_s": 200.0,
        "call_timeout_s": 60.0,
        "heartbeat_timeout_s": 10.0,
        "roles": {
            "policy": {"workers": 2, "cpus": 0.5, **THREAD},
            "critic": THREAD,
            "reference": THREAD,
            "reward": THREAD,
            "rollout": {"cpus": 0.5, **THREAD},
        },
    },
}
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
    """A mode of training, and what a run with a fault has in common with one without."""

    promise: Literal["bits", "each prompt once"]
    changes: Mapping[str, Any]
    begins: Mapping[str, tuple[str, int]]  # a stage begins once so many spans of this name have ended


IN_TURNS = {
    "rollouts": ("step", 3),
    "experience": ("rollouts", 4),
    "update": ("experience", 4),
    "weight_sync": ("update", 4),
    "eval": ("step", 4),
    "checkpoint": ("eval", 2),
    "export": ("checkpoint", 2),
}
AHEAD = {**IN_TURNS, "rollouts": ("step", 1), "experience": ("step", 3)}
CORRECTED = {"algorithm": {"correction": {"preset": "token_tis"}}, "rollouts": {"max_staleness": 2}}
MODES: Mapping[str, Mode] = {
    "in turns": Mode(promise="bits", changes={}, begins=IN_TURNS),
    "pipelined": Mode(promise="bits", changes=CORRECTED, begins=AHEAD),
    "in flight": Mode(
        promise="each prompt once",
        changes=merge(CORRECTED, {"rollouts": {"weight_updates": "in_flight"}}),
        begins=AHEAD,
    ),
    "conversations": Mode(promise="each prompt once", changes=GAME, begins=IN_TURNS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One cell of the matrix."""

    mode: str
    who: str
    when: str
    how: How

    def __str__(self) -> str:
        return f"{self.mode}: {self.how} {self.who} in {self.when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run with a fault. back_s: from the signal until the work went on. None: it never did."""

    fault: Fault
    back_s: float | None
    contradictions: list[str]


def run_config(folder: Path, mode: str, *, changes: Mapping[str, Any] = {}) -> Path:
    """Write the configuration of a run, whose folder is FOLDER/run, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    tree = merge(merge(BASE, MODES[mode].changes), changes)
    return write_config(folder / "run.yaml", {"run": {"name": "run", "dir": str(folder), "seed": 3}}, tree)


class Footprint:
    """The processes of a run, and the files in /dev/shm that they have mapped until now.

    A process is known by a variable that it inherits, or by a session in which such a process was seen. Ray overwrites
    the environment of its workers with their titles.
    """

    def __init__(self) -> None:
        self.variable = f"CHAOS_RUN={secrets.token_hex(8)}"
        self.sessions: set[int] = set()
        self.files: set[Path] = set()

    def start(self, config: Path, *arguments: str) -> subprocess.Popen[str]:
        """Start the run. Its output is kept beside the configuration."""
        name, _, value = self.variable.partition("=")
        with config.with_suffix(".log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*rlhf(), "train", str(config), "--quiet", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", name: value},
            )

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the run that have not ended."""
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
        """Add the files that the run maps now."""
        for process in self.processes():
            with suppress(OSError):
                lines = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
                paths = [line[line.index(f"{SHM}/") :] for line in lines if f" {SHM}/" in line]
                self.files.update(Path(path) for path in paths if not path.endswith("(deleted)"))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Look every two seconds during the block."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(2.0):
                self.look()

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def left(self) -> list[str]:
        """Wait for the end of the processes, and return what is left of the run."""
        wait_until(lambda: not self.processes(), lambda: False, limit_s=GONE_WITHIN_S, poll_s=0.5)
        lines = [f"{path} is left" for path in sorted(self.files) if path.exists()]
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                lines.append(f"process {process.pid} is left: {' '.join(process.cmdline())[:120]}")
        return lines

    def kill(self) -> None:
        """End all processes."""
        found = self.processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=GONE_WITHIN_S)


def _sessions(processes: Iterable[psutil.Process]) -> Iterator[int]:
    for process in processes:
        with suppress(ProcessLookupError):
            yield os.getsid(process.pid)


def survive(folder: Path, fault: Fault, unbroken: Path | None) -> Outcome:
    """Start a run, inject the fault, wait for the end of the run, and check all that it promises.

    Args:
        unbroken: the folder of the same run without a fault. None: the mode promises no equal bits.
    """
    victim, mode = VICTIMS[fault.who], MODES[fault.mode]
    config = run_config(folder, fault.mode)
    run, arguments = folder / "run", ["--supervise"] if victim.is_supervised else []
    tail, footprint, bad = TimelineTail(run / "timeline.json"), Footprint(), []
    process = footprint.start(config, *arguments)
    span, count = mode.begins[fault.when]

    def is_over() -> bool:
        return process.poll() is not None

    with footprint.followed():
        try:
            at = None
            if wait_until(lambda: tail.count(span) >= count, is_over, limit_s=LIMIT_S):
                at = inject(run, victim, fault.how, is_over)
            code = wait_for_end(process, LIMIT_S)
        finally:
            if not is_over():
                footprint.kill()
    if at is None:
        bad.append("the fault was not injected")
    if code != 0:
        bad.append(f"exit code {code}: {said(config)}")
    back_s = None if at is None else seconds_back(tail, at, victim.recovers)
    bad += contradictions(run, unbroken) if code == 0 else []
    bad += unrecorded(run, victim.recovers) if code == 0 and at is not None else []
    bad += footprint.left()
    return Outcome(fault=fault, back_s=back_s, contradictions=bad)


def wait_for_end(process: subprocess.Popen[str], limit_s: float) -> int | None:
    """Return the exit code of a run. None: it did not end within the limit."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=limit_s)
    return None


def said(config: Path) -> str:
    """Return the last words of a run."""
    return config.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


def steps_done(run: Path) -> int:
    """Return the last step with a whole row."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def seconds_back(tail: TimelineTail, at: float, role: str | None) -> float | None:
    """Return the seconds from the signal until the recovery of the role had ended. None: there was none."""
    ends = [span.end_s - at for span in tail.read() if (span.name, span.role) == ("recovery", role)]
    return min((seconds for seconds in ends if seconds > 0.0), default=None)


def contradictions(run: Path, unbroken: Path | None) -> list[str]:
    """Return what contradicts the promise of the mode."""
    bad = [] if main(["doctor", str(run)]) == 0 else ["rlhf doctor finds contradictions"]
    if not (run / "final").is_dir():
        return [*bad, "there is no final model"]
    if unbroken is None:
        return bad
    for row, other in zip(kept(run), kept(unbroken), strict=True):
        names = sorted(key for key in {**row, **other} if row.get(key) != other.get(key))
        bad += [f"step {row['step']}: {key} is {row.get(key)}, expected {other.get(key)}" for key in names]
    return bad if weights_hash(run) == weights_hash(unbroken) else [*bad, "the final weights differ"]


def kept(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run without times, memory and recoveries."""
    return [
        {key: value for key, value in row.items() if not key.startswith("recovery/")}
        for row in without_clocks(rows(run))
    ]


def weights_hash(run: Path) -> str:
    """Return a hash of the final weights."""
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def unrecorded(run: Path, role: str | None) -> list[str]:
    """Return which record of the recovery is missing."""
    if role is None:
        return []
    total = sum(row.get(f"recovery/{role}/total", 0.0) for row in rows(run))
    bad = [] if total == 1.0 else [f"recovery/{role}/total is {total:g} in all rows together, expected 1"]
    path = run / "errors.jsonl"
    errors = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if not any(error["kind"] in ("died", "hung") for error in errors):
        bad.append(f"errors.jsonl does not name the loss: {errors}")
    return bad


def train_unbroken(folder: Path, mode: str) -> Path:
    """Train without a fault, and return the folder of the run."""
    config, footprint = run_config(folder, mode), Footprint()
    code = wait_for_end(footprint.start(config), LIMIT_S)
    footprint.kill()
    assert code == 0, said(config)
    return folder / "run"
