"""The process of one trial: `rlhf train` on its file, on its share of the machine, ended in order or by force.

A process of its own session, so that Ctrl-C reaches the sweep alone, which then ends its trials. If the sweep dies, the
kernel ends them in order. Nothing here knows what a trial is good for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

END_WITHIN_S = 60.0  # a run that is told to end: it may be in a long call
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of this machine. Empty: all of it, as other trials have too."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()


class TrialProcess:
    """A started one."""

    def __init__(self, config: Path, log: Path, share: Share, *, until: int | None) -> None:
        command = [sys.executable, "-m", "rlhf.cli", "train", str(config), "--resume", "auto", "--quiet"]
        parent = os.getpid()

        def before_exec() -> None:  # in the child, which has this one thread
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # the sweep was gone before the child had asked to be told
            if share.cores:
                os.sched_setaffinity(0, share.cores)

        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, *(["--until", str(until)] if until is not None else [])],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {})},
                preexec_fn=before_exec,
            )
        self.pid = self._process.pid
        self._deadline: float | None = None

    def poll(self) -> int | None:
        """Its exit code; None: it goes on. One that was told to end and did not in time is killed with all below it."""
        code = self._process.poll()
        if code is None and self._deadline is not None and time.monotonic() > self._deadline:
            kill_tree(self.pid)
            code = self._process.wait()
        return code

    def interrupt(self) -> None:
        """Tell it to end in order, once."""
        if self._deadline is None and self._process.poll() is None:
            self._deadline = time.monotonic() + END_WITHIN_S
            self._process.send_signal(signal.SIGTERM)


def end_all(processes: Sequence[TrialProcess]) -> None:
    """Tell all to end, and wait until they have: none is left. A second Ctrl-C kills them."""
    for process in processes:
        process.interrupt()
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
    except KeyboardInterrupt:
        for process in processes:
            kill_tree(process.pid)
        raise


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        below = [top, *top.children(recursive=True)]
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10.0)
