"""Run `rlhf train` for a trial on its share of the machine, and end it with a signal or by force.

Each process has its own session, so that Ctrl-C reaches only the sweep, which then ends its trials. If the sweep
dies, the kernel sends them SIGTERM. This module knows nothing about metrics or methods.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from rlhf.stopping import StopRequest

END_WITHIN_S = 60.0  # in addition to the grace period for the step and its checkpoint
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Name a part of this machine. Empty fields mean the whole machine, shared with other trials."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()


class Process(Protocol):
    """Control the process of one trial."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def interrupt(self) -> None:
        """Ask the process to end by sending SIGTERM once."""

    def kill(self) -> None:
        """Kill it and all its descendants now."""


class _Started:
    """Start a process, and kill it if it does not end in time after SIGTERM."""

    def __init__(self, words: Sequence[str], share: Share, *, grace_s: float, **streams: Any) -> None:
        self.end_within_s = grace_s + END_WITHIN_S
        parent = os.getpid()

        def before_exec() -> None:  # runs in the child, which has a single thread
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # the sweep ended before prctl took effect
            if share.cores:
                os.sched_setaffinity(0, share.cores)

        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            **streams,
            start_new_session=True,
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {})},
            preexec_fn=before_exec,
        )
        self.deadline: float | None = None

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs. Kill it after its deadline."""
        code = self.process.poll()
        if code is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.kill()
            code = self.process.wait()
        return code

    def interrupt(self) -> None:
        """Send SIGTERM once and set the deadline."""
        if self.deadline is None and self.process.poll() is None:
            self.deadline = time.monotonic() + self.end_within_s
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and all its descendants now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            below = [top, *top.children(recursive=True)]
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(below, timeout=10.0)


class TrialProcess(_Started):
    """Run `rlhf train` for one trial."""

    def __init__(self, config: Path, log: Path, share: Share, *, until: int | None, grace_s: float = 0.0) -> None:
        words = ["rlhf.cli", *train_words(config, until)]
        with log.open("ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            super().__init__(words, share, grace_s=grace_s, **streams)


class WarmProcess(_Started):
    """Run consecutive trials in one process, and keep its engines while the next trial can use them.

    The process ends with the first trial that fails or is interrupted, so the next trial starts in a new process.
    """

    def __init__(self, share: Share, *, grace_s: float = 0.0) -> None:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        super().__init__(["rlhf.serve_trials"], share, grace_s=grace_s, **streams)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def begin(self, config: Path, log: Path, *, until: int | None) -> None:
        """Send the next trial to the process."""
        assert self.process.stdin is not None
        order = {"words": train_words(config, until), "log": str(log)}
        with contextlib.suppress(BrokenPipeError):  # poll then reports how it ended
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def poll(self) -> int | None:
        """Return the exit code of the trial, or None while it runs."""
        assert self.process.stdout is not None
        code, ended_well = super().poll(), self.process.stdout.readline()
        if ended_well and self.deadline is None:
            return 0
        if ended_well:  # the trial finished before it handled the stop request
            self.dismiss()
        return code

    @property
    def is_idle(self) -> bool:
        """Return whether the process can take another trial: it runs and was not asked to end."""
        return self.deadline is None and self.process.poll() is None

    def dismiss(self) -> None:
        """Close its input after the last trial, so that it ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.deadline = time.monotonic() + self.end_within_s


def train_words(config: Path, until: int | None) -> list[str]:
    """Return the arguments of `rlhf`."""
    words = ["train", str(config), "--resume", "auto", "--quiet"]
    return [*words, "--until", str(until)] if until is not None else words


def end_all(processes: Sequence[Process], request: StopRequest) -> None:
    """Send SIGTERM to all processes and wait until none is left. A second signal kills them."""
    for process in processes:
        process.interrupt()
    wait_for_all(processes, request)


def wait_for_all(processes: Sequence[Process], request: StopRequest) -> None:
    """Wait until all processes have ended, each within its deadline. An interrupt kills them."""
    while any(process.poll() is None for process in processes):
        if request.interrupted.is_set():
            for process in processes:
                process.kill()
        time.sleep(0.1)
