"""Run the trials of a sweep in processes, each on a share of the machine, and end processes with a signal or by force.

Each process has a separate session, so that Ctrl-C reaches only the sweep, and the sweep then ends all trials. If the
sweep dies, the kernel sends SIGTERM to all processes. This module knows nothing about metrics or methods.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.process.stopping import StopRequest

END_WITHIN_S = 60.0  # in addition to the grace period for the step and its checkpoint
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineShare:
    """Name a part of this machine. Empty fields mean the whole machine, shared with all trials."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()


class TrialProcess:
    """Run the command of a trial on a share of the machine. The command's output goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, share: MachineShare, *, grace_s: float = 0.0) -> None:
        self.end_within_s = grace_s + END_WITHIN_S
        self.deadline: float | None = None
        parent = os.getpid()
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {}

        def before_exec() -> None:  # runs in the child, which has a single thread
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # the sweep ended before prctl took effect
            if share.cores:
                os.sched_setaffinity(0, share.cores)

        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, **gpus},
                preexec_fn=before_exec,
            )

    def poll(self) -> int | None:
        """Return the exit code of the trial, or None while it runs. Kill the process after the deadline."""
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
        """Kill the process and all descendants now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            below = [top, *top.children(recursive=True)]
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(below, timeout=10.0)


def wait_for_all(processes: Sequence[TrialProcess], request: StopRequest) -> None:
    """Wait until all processes have ended, each within a deadline. An interrupt kills all processes."""
    while any(process.poll() is None for process in processes):
        if request.interrupted.is_set():
            for process in processes:
                process.kill()
        time.sleep(0.1)
