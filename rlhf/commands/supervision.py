"""Start a driver again after each death: the parent process of `rlhf train --supervise`.

The supervisor passes signals on to the driver, and kills a driver that stays stopped. Orphans of the driver become
children of the supervisor. Before a new start, the supervisor ends all processes that the dead driver left on this
machine. The module imports neither PyTorch nor Ray, to stay small and independent of failures in either.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.errors import LossKind
from rlhf.process.driver_parent import DriverDeath, DriverReport, message_to_driver, read_report
from rlhf.process.stopping import SIGNALS
from rlhf.process.system_calls import memfd
from rlhf.tracking import logs
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.run_folder.folder import pointed

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
STOPPED_FOR_S = 60.0  # a driver stopped for longer counts as hanging
END_BY_THEMSELVES_S = 2.0  # Ray's daemons end with the driver, and helpers of Python then remove shared memory
GONE_WITHIN_S = 30.0
ENDS = (0, 2, 128 + signal.SIGINT)  # exit codes: done, invalid input, Ctrl-C
FROM_KERNEL = 0x80  # SI_KERNEL: a terminal has sent the signal to the driver too
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverEnd:
    code: int  # negative: the signal that killed the driver
    is_told: bool  # this process got a signal to end the run
    hung: bool  # this process killed the driver, which had been stopped for too long
    report: DriverReport


def supervise(first: Sequence[str], again: Sequence[str]) -> int:
    """Run a driver, with new starts until the run has ended. Return the exit code of the last driver.

    Args:
        first: the command of the driver.
        again: the command once a driver has opened the folder of its run.
    """
    logs.configure()
    restarts, command = DriverRestarts(), first
    others = psutil.Process().children(recursive=True)  # that a shell has started before `exec`
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with _held_signals() as (heard, before):
        while True:
            end = _run(command, restarts.deaths, heard, before)
            is_lost = not (end.is_told or end.report.is_final or end.code in ENDS)
            if is_lost:
                _end_descendants(others)
            came_late = signal.sigpending() & (heard - {signal.SIGCHLD})  # after the driver's end
            if not is_lost or came_late or not restarts.allow(end):
                return end.code if end.code >= 0 else 128 - end.code
            if end.report.folder is not None:
                command = again


class DriverRestarts:
    """Decides whether a dead driver is started again, and holds the deaths for the successor to record."""

    def __init__(self) -> None:
        self.deaths: list[DriverDeath] = []  # since the checkpoint; a resumed run removes all later records
        self._report = DriverReport()  # the last report of a run that had begun
        self._times: deque[float] = deque()
        self._checkpoint: tuple[str | None, int | None] = None, None
        self._last: tuple[object, ...] = ()

    def allow(self, end: DriverEnd) -> bool:
        """Log and remember a death, and return whether the driver is started again."""
        has_begun = end.report.folder is not None
        self._report = end.report if has_begun else self._report
        folder, now = self._report.folder, time.monotonic()
        while self._times and now - self._times[0] > self._report.window_s:
            self._times.popleft()
        self._times.append(now)
        step, checkpoint = None, self._checkpoint
        if folder is not None:
            with suppress(OSError, ValueError, KeyError):  # a failing file system, or a damaged file
                checkpoint = folder, pointed(Path(folder) / "checkpoints" / "latest")
                step = _last_step(Path(folder))
        if checkpoint != self._checkpoint:
            self._checkpoint, self.deaths = checkpoint, []
        after = "after an unknown step" if step is None else f"after step {step}"
        message = f"The driver {_how_it_died(end)} {after if has_begun else 'before its run began'}."
        kind: LossKind = "hung" if end.hung else "died"
        self.deaths = [*self.deaths, DriverDeath(at=time.time(), kind=kind, message=message)]
        last, self._last = self._last, (has_begun, folder, step, end.code)
        count, most = len(self._times), self._report.restarts
        if count > most:
            reason = f"it died {count} times in {self._report.window_s:.0f} s (cluster.restarts.gang)"
        elif self._last == last and (step is not None or not has_begun):
            reason = "it died twice in a row at the same step in the same manner"
        else:
            logger.warning("%s It is started again (%d of at most %d, cluster.restarts.gang).", message, count, most)
            return True
        logger.error("%s It is not started again: %s.", message, reason)
        return False


def _last_step(folder: Path) -> int:
    rows = read_lines(folder / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def _how_it_died(end: DriverEnd) -> str:
    if end.hung:
        return f"was stopped for {STOPPED_FOR_S:.0f} s, and was killed"
    return f"was killed by {signal.Signals(-end.code).name}" if end.code < 0 else f"ended with exit code {end.code}"


@contextmanager
def _held_signals() -> Iterator[tuple[set[signal.Signals], set[signal.Signals]]]:
    """Block the signals of `_watch`. Yield the signals and the earlier mask. Ignored signals stay ignored."""
    heard = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN} | {signal.SIGCHLD}
    before = {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, heard)}
    try:
        yield heard, before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(
    command: Sequence[str], deaths: Sequence[DriverDeath], heard: set[signal.Signals], before: set[signal.Signals]
) -> DriverEnd:
    parent = os.getpid()

    def before_exec() -> None:  # runs in the child, which has a single thread
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent ended before prctl took effect

    file = memfd("driver report")
    try:
        driver = subprocess.Popen(
            command, env={**os.environ, **message_to_driver(file, deaths)}, pass_fds=(file,), preexec_fn=before_exec
        )
        is_told, hung = _watch(driver, heard)
        return DriverEnd(code=driver.returncode, is_told=is_told, hung=hung, report=read_report(file))
    finally:
        os.close(file)


def _watch(driver: subprocess.Popen[bytes], heard: set[signal.Signals]) -> tuple[bool, bool]:
    """Wait for the driver's end. Return whether a signal came for the run, and whether the driver hung."""
    is_told = hung = False
    stopped_s, last_look = 0.0, time.monotonic()
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        info = signal.sigtimedwait(heard, LOOK_EVERY_S)
        _reap(besides=driver.pid)
        if info is not None and info.si_signo != signal.SIGCHLD:
            is_told = True
            if info.si_code != FROM_KERNEL:
                driver.send_signal(info.si_signo)
        now = time.monotonic()
        # The time in which this process was stopped too, as by Ctrl-Z, does not count.
        is_stopped = _is_stopped(process)
        stopped_s = stopped_s + min(now - last_look, LOOK_EVERY_S) if is_stopped else 0.0
        last_look = now
        if stopped_s > STOPPED_FOR_S:
            hung = True
            driver.kill()
    return is_told, hung


def _is_stopped(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # Popen.send_signal has reaped it
        return process.status() == psutil.STATUS_STOPPED
    return False


def _reap(*, besides: int | None = None) -> None:
    with suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == besides:
                return
            os.waitpid(ended.si_pid, 0)


def _end_descendants(others: Collection[psutil.Process]) -> None:
    """End all processes of the dead driver here. Spare the earlier processes `others` and their descendants."""
    for limit_s, is_patient in ((END_BY_THEMSELVES_S, True), (GONE_WITHIN_S, False)):
        give_up = time.monotonic() + limit_s
        while left := _descendants(others):
            if time.monotonic() > give_up:
                break
            for process in () if is_patient else left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
        if not left:
            return
    logger.warning("processes %s still exist after they were killed", ", ".join(str(process.pid) for process in left))


def _descendants(others: Collection[psutil.Process]) -> list[psutil.Process]:
    """Return the running descendants of this process, without `others` and their descendants."""
    _reap()
    running, spared = [], set(others)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    for process in others:
        with suppress(psutil.NoSuchProcess):
            spared.update(process.children(recursive=True))
    return [process for process in running if process not in spared]
