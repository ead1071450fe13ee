"""Control a reward process from the parent: start the process, send calls, locate a hang, and kill.

Every wait has a deadline. The pool decides the effect of a death or a timeout.
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
from collections.abc import Mapping, Sequence

import psutil

from rlhf.errors import RunError
from rlhf.extensions import CodeSource, LoadError, describe_frames
from rlhf.rewards.processes.program import BrokenFrame, Hello, Reply, Request, Signature, receive_frame, send_frame

logger = logging.getLogger(__name__)

MAX_LOG_LINES = 20  # lines of a reward's output per request
KILL_WAIT_S = 10.0
MARK = "RLHF_REWARD_PROCESS"  # environment variable to identify child processes of a reward
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_INVALID_DATA = "it wrote invalid data to the connection for its answers"


class ProcessTimeout(Exception):
    """Raised if there is no answer within the limit. The process still runs."""


class ProcessDied(Exception):
    """Raised if the process has ended. The message says how."""


class ChildProcess:
    """A process that runs a user's code in a separate process group, with a connection to the parent.

    The child dies with this process. All output is logged. On a signal, the child writes its place in the code.
    """

    def __init__(self, program: str, *, label: str, env: Mapping[str, str]) -> None:
        self.connection, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        self.output, output = os.pipe()
        os.set_blocking(self.output, False)
        self.faults = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115  closed by close
        self.log = OutputLog(label)
        fds = (theirs.fileno(), lifeline, self.faults.fileno())
        boot = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {program} import main; main{fds}"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", boot, json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
                start_new_session=True,  # a new process group: killed together with its children
                # hash seed: iteration over a set is deterministic
                env={**os.environ, "PYTHONHASHSEED": "0", **env},
            )
        finally:
            theirs.close()
            os.close(lifeline)
            os.close(output)

    def read_output(self) -> bool:
        """Log the output written so far. Return False at the end of the output."""
        return self.log.read(self.output)

    def read_faults(self) -> str:
        """Return the places in the code as written by the process and its children."""
        return os.pread(self.faults.fileno(), 1 << 20, 0).decode(errors="replace")

    def describe_end(self, code: int, path: str | None) -> str:
        """Return how a process with this exit code ended, with the last place in `path` and the last output."""
        how = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"
        self.read_output()
        place = place_in(self.read_faults(), path)
        last = f'; its last output: "{self.log.last_line}"' if self.log.last_line else ""
        return f"{how}{place and ', at ' + place}{last}"

    def close(self) -> None:
        """Log the remaining output, and close the connection and the files. Remaining processes then end."""
        self.read_output()
        self.connection.close()
        self.faults.close()
        os.close(self._lifeline)
        os.close(self.output)


class RewardProcess:
    """A process with `sources` loaded, for a single caller at a time."""

    def __init__(self, sources: Sequence[CodeSource], *, memory_gib: float) -> None:
        self._sources = tuple(sources)
        self._memory_gib = memory_gib
        self._mark = uuid.uuid4().hex
        self._child = ChildProcess("rlhf.rewards.processes.program", label="reward", env={MARK: self._mark})
        self._process, self._connection = self._child.process, self._child.connection
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        self._poll.register(self._child.output, select.POLLIN)
        self._hello = Hello(memory_bytes=int(memory_gib * 2**30), sources=self._sources)

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, timeout_s: float) -> tuple[Signature, ...]:
        """Wait until every reward is loaded. LoadError has the message of the first failure."""
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
        except (ProcessTimeout, ProcessDied) as error:
            source, end = self._sources[len(signatures)], f"ended its process: {error}"
            if isinstance(error, ProcessTimeout):
                place = self.where(source.path)
                end = f"took over {timeout_s:g} s{place and ', at ' + place}"
            raise LoadError(f"loading `{source.name}` {end}") from error
        return tuple(signatures)

    def send(self, message: Hello | Request, timeout_s: float) -> None:
        """Send a message. Raises ProcessTimeout and ProcessDied."""
        self._child.log.lines_left = MAX_LOG_LINES
        self._connection.settimeout(timeout_s)
        try:
            send_frame(self._connection, message)
        except TimeoutError as error:
            raise ProcessTimeout from error
        except OSError as error:
            raise ProcessDied(self._how_it_died()) from error

    def receive(self, timeout_s: float) -> Reply:
        """Read a message, and log the process's output in the meantime. Raises ProcessTimeout and ProcessDied."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            ready = {fd for fd, _ in self._poll.poll(left * 1000)}
            if self._child.output in ready and not self._child.read_output():
                self._poll.unregister(self._child.output)
            if self._connection.fileno() in ready:
                break
            if left == 0.0:  # the process has ended, but a child process still holds the connection
                raise ProcessTimeout if self._process.poll() is None else ProcessDied(self._how_it_died())
        self._connection.settimeout(max(deadline - time.monotonic(), 0.1))
        try:
            message = receive_frame(self._connection)
        except TimeoutError as error:
            raise ProcessTimeout from error
        except (EOFError, OSError) as error:
            raise ProcessDied(self._how_it_died()) from error
        except BrokenFrame as error:
            raise ProcessDied(f"{_INVALID_DATA} ({error})") from error
        if not isinstance(message, Reply):
            raise ProcessDied(f"{_INVALID_DATA} (a {type(message).__name__})")
        return message

    def where(self, path: str | None) -> str:
        """Return the current place in the reward's code, `file:line in function`, or an empty string if unknown."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 0.5
        text = ""
        while time.monotonic() < deadline:
            time.sleep(0.05)
            earlier, text = text, self._child.read_faults()
            if text and text == earlier:
                break
        return place_in(text, path)

    def signal_end(self) -> None:
        """Send SIGKILL to the process and its children, from any thread. The owner must still call `kill`."""
        if self._process.returncode is None:  # a reaped id may belong to another process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the process with all its children, and wait for its end. RunError if the process does not end."""
        self.signal_end()
        self._kill_daemons()
        try:
            self._process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"reward process {self.pid} still runs {KILL_WAIT_S:g} s after SIGKILL") from error
        finally:
            self._child.close()

    def _kill_daemons(self) -> None:
        """Kill processes outside the process group, such as a daemon with its own session. Daemons inherit the mark."""
        for _ in range(3):  # a killed daemon may have started another
            others = [process for process in psutil.process_iter(["environ"]) if process.pid != self.pid]
            daemons = [process for process in others if (process.info["environ"] or {}).get(MARK) == self._mark]
            for daemon in daemons:
                with contextlib.suppress(psutil.Error):
                    daemon.kill()
            if not daemons:
                return

    def flush_log(self) -> None:
        self._child.read_output()

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        end = self._child.describe_end(code, None)
        killed = "it was killed by SIGKILL"
        return end.replace(killed, f"{killed} (by another process, or by the kernel because memory ran out)", 1)


def place_in(text: str, path: str | None) -> str:
    """Return the place in the user's code from a faulthandler dump."""
    return describe_frames([(file, int(line), name) for file, line, name in _FRAME.findall(text)][::-1], path)


class OutputLog:
    """Logs the output of rewards or environments in whole lines, up to a limit per request."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines_left = MAX_LOG_LINES
        self.last_line = ""
        self._partial = b""

    def read(self, fd: int) -> bool:
        """Read the available output of a non-blocking pipe. Return False at the end of the pipe."""
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
            logger.info("%s output: %s", self.source, self.last_line)
        elif self.lines_left == -1:
            logger.info("%s output: only the first %d lines for a group are shown", self.source, MAX_LOG_LINES)
