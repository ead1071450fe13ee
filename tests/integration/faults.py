"""Small runs to kill, stop or end: configurations, processes, and progress."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.integration.recipes import ONLINE, merge, write_config

MANY = 100_000  # more steps than a test waits for


GRPO: Mapping[str, Any] = {
    "algorithm": {"name": "grpo"},
    "data": {"eval": None},
    "eval": None,
    "rewards": {"mine": {"function": "mine.py:reward"}},
    "rollouts": {"prompts_per_step": 4},
    "train": {"steps": 2, "checkpoint_every": 1},
    "cluster": {"object_store_gib": 0.25, "call_timeout_s": 60.0, "roles": {"policy": {"cpus": 0.5}}},
}


SFT: Mapping[str, Any] = {
    "algorithm": {"name": "sft"},
    "data": {"train": {"split": "sft"}, "eval": None, "max_prompt_tokens": None},
    "eval": None,
    "rollouts": None,
    "train": {"steps": MANY, "checkpoint_every": 2},
    "cluster": {"roles": {"policy": {"workers": 2, "cpus": 0.5, "threads": 1}}},
}


FINE = "def reward(prompt, response):\n    return float(len(response) % 3)\n"


def write_run(folder: Path, name: str, *changes: Mapping[str, Any], reward: str = FINE) -> Path:
    """Write a run's config, with the reward function beside the config."""
    (folder / "mine.py").write_text(reward, encoding="utf-8")
    run = {"run": {"name": name, "dir": str(folder)}}
    return write_config(folder / f"{name}.yaml", {}, functools.reduce(merge, (*changes, run), ONLINE))


def actor_processes(role: str = "") -> list[psutil.Process]:
    """Return the actors' processes among the processes started here, named by Ray after their class."""
    found, named = [], r"\w+(Rank|Worker|Engine)"
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if re.match(rf"ray::{role or named}\b", title) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


def steps_done(run: Path) -> int:
    """Return the last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@contextmanager
def once(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Act from a second thread as soon as the condition holds. The condition must hold during the block."""
    over, acted = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if condition():
                act()
                acted.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert acted.is_set()


def checkpoints(run: Path) -> list[str]:
    """Return the names of the checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def await_steps(runs: Mapping[Path, subprocess.Popen[str]], wanted: Mapping[Path, int]) -> None:
    """Wait until the running runs have done the wanted steps."""
    until = time.monotonic() + 240.0
    while any(steps_done(run) < steps for run, steps in wanted.items()):
        for run, process in runs.items():
            assert process.poll() is None, run.with_suffix(".log").read_text(encoding="utf-8")
        assert time.monotonic() < until
        time.sleep(0.05)


def end(
    process: subprocess.Popen[str],
    number: signal.Signals,
    code: int,
    *,
    late: Collection[str] = (),
    send: Callable[[int, int], None] = os.kill,
) -> None:
    """Send a signal, and assert the exit code and the end of all child processes; `late` ones get more time."""
    started = {one: one.name() for one in psutil.Process(process.pid).children(recursive=True)}
    send(process.pid, number)
    assert process.wait(timeout=60) == code
    _, alive = psutil.wait_procs([one for one, title in started.items() if title not in late], timeout=60.0)
    assert not alive


def kill_all(pid: int) -> None:
    """Kill a process and all descendants with kill -9."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def wait_for(path: Path, lines: int, *, timeout_s: float) -> None:
    """Wait until a file has so many lines."""
    until = time.monotonic() + timeout_s
    while not path.exists() or len(path.read_bytes().splitlines()) < lines:
        assert time.monotonic() < until, f"{path} had no {lines} lines in {timeout_s} s"
        time.sleep(0.05)
