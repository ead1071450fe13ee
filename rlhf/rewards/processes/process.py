"""The parent's side of one reward process: start, ask, find out where it hangs, kill.

Every wait has a deadline. It holds no policy: what a death or a time-out means is the pool's business.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.errors import RunError
from rlhf.rewards.processes.program import (
    BrokenFrame,
    Hello,
    LoadError,
    Reply,
    Request,
    Signature,
    Source,
    describe_frames,
    receive_frame,
    send_frame,
)

logger = logging.getLogger(__name__)

MAX_LOG_LINES = 20  # of a reward's own output, each request
KILL_WAIT_S = 10.0
MARK = "RLHF_REWARD_PROCESS"  # environment variable by which the processes that a reward started are known
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rlhf.rewards.processes.program import main; main({}, {}, {})"
)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


class ProcessTimeout(Exception):
    """No answer within the limit. The process is still there."""


class ProcessDied(Exception):
    """The process is gone. The message says how."""


class RewardProcess:
    """One process that loads `sources`. For one caller at a time."""

    def __init__(self, sources: Sequence[Source], *, memory_gib: float) -> None:
        self._sources = tuple(sources)
        self._memory_gib = memory_gib
        self._connection, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        self._output, output = os.pipe()
        os.set_blocking(self._output, False)
        self._faults = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        self._log = OutputLog()
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        self._poll.register(self._output, select.POLLIN)
        fds = (theirs.fileno(), lifeline, self._faults.fileno())
        self._mark = uuid.uuid4().hex
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT.format(*fds), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
                start_new_session=True,  # a group of its own: killed together with what a reward starts
                # hash seed: a reward that walks through a set gives one answer
                env={**os.environ, "PYTHONHASHSEED": "0", MARK: self._mark},
            )
        finally:
            theirs.close()
            os.close(lifeline)
            os.close(output)
        self._hello = Hello(memory_bytes=int(memory_gib * 2**30), sources=self._sources)

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, timeout_s: float) -> tuple[Signature, ...]:
        """Wait until every reward is loaded. LoadError with the message of the first that is not."""
        deadline = time.monotonic() + timeout_s
        signatures: list[Signature] = []
        try:
            self.send(self._hello, timeout_s)
            while len(signatures) < len(self._sources):
                reply = self.receive(max(deadline - time.monotonic(), 0.0))
                if reply.kind == "failed":
                    limit = f"; the limit is reward_policy.memory_gib: {self._memory_gib:g}"
                    raise LoadError(reply.payload + (limit if "MemoryError" in reply.payload else ""))
                signatures.append(reply.payload)
        except ProcessTimeout as error:
            source = self._sources[len(signatures)]
            place = self.where(source.path)
            raise LoadError(f"loading `{source.name}` took over {timeout_s:g} s{place and ', at ' + place}") from error
        except ProcessDied as error:
            source = self._sources[len(signatures)]
            raise LoadError(f"loading `{source.name}` ended its process: {error}") from error
        return tuple(signatures)

    def send(self, message: Hello | Request, timeout_s: float) -> None:
        """Write one message. ProcessTimeout, ProcessDied."""
        self._log.lines_left = MAX_LOG_LINES
        self._connection.settimeout(timeout_s)
        try:
            send_frame(self._connection, message)
        except TimeoutError as error:
            raise ProcessTimeout from error
        except OSError as error:
            raise ProcessDied(self._how_it_died()) from error

    def receive(self, timeout_s: float) -> Reply:
        """Read one message, and pass the process's output to the log meanwhile. ProcessTimeout, ProcessDied."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            ready = {fd for fd, _ in self._poll.poll(left * 1000)}
            if self._output in ready and not self._log.read(self._output):
                self._poll.unregister(self._output)
            if self._connection.fileno() in ready:
                break
            if left == 0.0 and self._process.poll() is not None:  # a process that it started holds the connection
                raise ProcessDied(self._how_it_died())
            if left == 0.0:
                raise ProcessTimeout
        self._connection.settimeout(max(deadline - time.monotonic(), 0.1))
        try:
            message = receive_frame(self._connection)
        except TimeoutError as error:
            raise ProcessTimeout from error
        except (EOFError, OSError) as error:
            raise ProcessDied(self._how_it_died()) from error
        except BrokenFrame as error:
            raise ProcessDied(f"it wrote something else where its answers are read ({error})") from error
        if not isinstance(message, Reply):
            raise ProcessDied(f"it wrote something else where its answers are read (a {type(message).__name__})")
        return message

    def where(self, path: str | None) -> str:
        """Where in the reward's code the process is now: `file:line in function`, or nothing if it does not say."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 0.5
        text = ""
        while time.monotonic() < deadline:
            time.sleep(0.05)
            earlier, text = text, self._read_faults()
            if text and text == earlier:
                break
        return place_in(text, path)

    def signal_end(self) -> None:
        """Have it killed with all that it started; `kill` must still be called by who uses it. From any thread."""
        if self._process.returncode is None:  # else it has been reaped, and its id may be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the process and all that it started, and return when it is gone; RunError if it will not go."""
        self.signal_end()
        self._kill_daemons()
        try:
            self._process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"reward process {self.pid} is still there {KILL_WAIT_S:g} s after SIGKILL") from error
        finally:
            self._log.read(self._output)
            self._connection.close()
            self._faults.close()
            for fd in (self._lifeline, self._output):
                os.close(fd)

    def _kill_daemons(self) -> None:
        """Kill what left the process's group, such as a daemon of its own session: it inherited the mark."""
        mark = f"{MARK}={self._mark}".encode()
        for _ in range(3):  # one that is killed may have started another meanwhile
            daemons = [pid for pid in _other_processes(self.pid) if mark in _environment_of(pid)]
            for pid in daemons:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not daemons:
                return

    def flush_log(self) -> None:
        """Pass what it has written so far to the log."""
        self._log.read(self._output)

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code < 0:
            how = f"it was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (by somebody, or by the kernel for want of memory)"
        else:
            how = f"it exited with code {code}"
        self._log.read(self._output)
        place = place_in(self._read_faults(), None)
        last = f'; its last output: "{self._log.last_line}"' if self._log.last_line else ""
        return f"{how}{place and ', at ' + place}{last}"

    def _read_faults(self) -> str:
        self._faults.seek(0)
        return self._faults.read().decode(errors="replace")


def _other_processes(pid: int) -> Iterator[int]:
    """Yield the ids of all processes but this one and `pid`."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (os.getpid(), pid):
            yield int(entry)


def _environment_of(pid: int) -> list[bytes]:
    """Return what the process was started with; nothing of one that has ended, or that is another user's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def place_in(text: str, path: str | None) -> str:
    """Where in the user's code a process was that wrote this by faulthandler."""
    return describe_frames([(file, int(line), name) for file, line, name in _FRAME.findall(text)][::-1], path)


class OutputLog:
    """Passes what rewards (or an environment) print to the log, whole lines, so many a request."""

    def __init__(self, what: str = "reward") -> None:
        self.what = what
        self.lines_left = MAX_LOG_LINES
        self.last_line = ""
        self._partial = b""

    def read(self, fd: int) -> bool:
        """Take what a non-blocking pipe holds. False at its end."""
        while True:
            try:
                chunk = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            self._partial = self._partial[-(1 << 16) :]
            for line in lines:
                self._log(line)

    def _log(self, line: bytes) -> None:
        self.last_line = line.decode(errors="replace")[:500]
        self.lines_left -= 1
        if self.lines_left >= 0:
            logger.info("%s output: %s", self.what, self.last_line)
        elif self.lines_left == -1:
            logger.info("%s output: more lines than %d for one group are left out", self.what, MAX_LOG_LINES)
