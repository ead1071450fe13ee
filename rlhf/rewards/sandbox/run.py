"""Run a Python program written by a model in a sandbox.

A sandboxed program is a single process without files, network, child processes or the parent's environment. The program
may read the system's libraries and the interpreter, and write to standard output, standard error and the results. All
outputs live in memory and have a size limit, so nothing is left behind. There are two levels of protection with the
same behaviour for programs, and `Sandbox` uses the first available level. Never start a model's program by other means.
"""

from __future__ import annotations

import contextlib
import io
import logging
import marshal
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.process.system_calls import memfd, pidfd_open, seal
from rlhf.rewards.sandbox.confinement import Unavailable, landlock_ruleset, seccomp_filter

logger = logging.getLogger(__name__)

Rung = Literal["bubblewrap", "landlock", "unsafe"]

NOBODY = 65534  # user id for bubblewrap if this process is root
# User ids for programs at the level landlock if this process is root. Each run draws one, because the kernel counts the
# threads of a user. systemd gives ids of this range to services with DynamicUser. If a service has the drawn id, the
# service's threads count too. The program can neither send signals to the service nor read the service's files.
PROGRAM_USERS = range(61184, 65520)
MAX_THREADS = 64
OUTPUT_BYTES = 16 * 2**20  # limit for each of standard output, standard error and results
START_LIMIT_S = 30.0  # until the process is confined on a busy machine; excluded from the program's time
KILL_WAIT_S = 10.0
_THREAD_CHECK_S = 0.05  # interval of the thread count check

_SOURCE = Path(__file__).with_name("program.py")
_PREFIXES = "import sys; print(sys.prefix); print(sys.base_prefix)"
READABLE = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom")
_WRITABLE = ("/dev/null",)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # iteration over a set is deterministic
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(Exception):
    """Raised if the sandbox itself fails or is unavailable. The error says nothing about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a program. `code` is the exit code, or minus the signal, or None after a kill at a limit."""

    code: int | None
    stdout: bytes
    stderr: bytes
    results: bytes
    seconds: float  # since the confinement


class Sandbox:
    """Runs programs from several threads, at the first of the following protection levels able to run `print(1)` here.

    1. bubblewrap: namespaces with only libraries mounted, as an unprivileged user; and the seccomp filter.

    2. landlock: Landlock's rules on files, and the seccomp filter. If this process is root, programs run as an
       unprivileged user. Programs run as root without capabilities if only root may read the interpreter, or if this
       process may not change the user.

    3. unsafe, only with `unsafe`: limits on memory, time and output, and no protection.

    `python` is the interpreter, with all installed packages. None selects this process's interpreter, or the system's
    if an unprivileged user cannot read it, both without packages. SandboxError if no level works.
    """

    def __init__(
        self, *, python: str | None = None, memory_mib: int = 1024, unsafe: bool = False, rungs: Sequence[Rung] = ()
    ) -> None:
        self._memory_bytes = memory_mib * 2**20
        self._flags = ["-s"] if python else ["-s", "-S"]
        refusals = []
        ladder: tuple[Rung, ...] = ("bubblewrap", "landlock", "unsafe") if unsafe else ("bubblewrap", "landlock")
        for rung in rungs or ladder:
            for interpreter in [python] if python else _interpreters():
                try:
                    self._prepare(rung, interpreter)
                except (SandboxError, Unavailable, OSError, subprocess.SubprocessError) as error:
                    refusals.append(f"{rung} with {interpreter}: {error}")
                    continue
                if rung == "unsafe":
                    logger.warning("programs run without a sandbox: %s", "; ".join(refusals))
                logger.info("programs run by %s with %s", rung, interpreter)
                return
        raise SandboxError(
            "no sandbox for programs works on this machine. Install bubblewrap (`apt-get install bubblewrap`), or use "
            "a kernel with Landlock (5.13 or later). " + "; ".join(refusals)
        )

    def _prepare(self, rung: Rung, python: str) -> None:
        self.rung: Rung = rung
        self.python = python
        probe = subprocess.run(
            [python, *self._flags, "-c", _PREFIXES], capture_output=True, text=True, timeout=30, env=_ENVIRONMENT
        )
        if probe.returncode != 0:
            raise SandboxError(f"the interpreter does not run: {probe.stderr.strip()[-200:]}")
        prefixes = list(dict.fromkeys(probe.stdout.split("\n")[:2]))
        readable = [*READABLE, *prefixes]
        self._changes_user = rung == "landlock" and _may_change_user() and all(map(_everybody_reads, prefixes))
        self._command = [python, *self._flags, "-c", _SOURCE.read_text(encoding="utf-8")]
        self._filter = None if rung == "unsafe" else seccomp_filter().hex()
        self._ruleset = landlock_ruleset(readable, _WRITABLE) if rung == "landlock" else None
        if rung == "bubblewrap":
            bubblewrap = shutil.which("bwrap")
            if bubblewrap is None:
                raise SandboxError("bwrap is not installed")
            self._command = [bubblewrap, *namespaces(readable), *self._command]
        done = self.run("print(1)", wall_s=5.0)
        if (done.code, done.stdout) != (0, b"1\n"):
            raise SandboxError(f"print(1) ended with {done.code}: {done.stderr.decode(errors='replace')[-200:]}")

    def run(
        self, program: str, *, wall_s: float, stdin: bytes = b"", tests: Mapping[str, Any] | None = None
    ) -> Finished:
        """Run a program to the end, or to the limit.

        `tests` are the test fields of a job for `rlhf.rewards.sandbox.program`. None runs a script.
        """
        wrapped = self.rung == "bubblewrap"
        is_nobody = wrapped and os.geteuid() == 0
        user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_nobody else {}
        job = {"mark": None, **(tests or {}), "program": program, **self._restrictions(wall_s)}
        with ExitStack() as held:
            job_file, stdin_file = (held.enter_context(_memory(data)) for data in (marshal.dumps(job, 2), stdin))
            stdout, stderr, results = (held.enter_context(_memory()) for _ in range(3))
            ready, say_ready = _pipe(held)
            info, say_info = _pipe(held)
            passed = [file.fileno() for file in (job_file, say_ready, results)]
            command = [*self._command, *map(str, passed)]
            if wrapped:
                command[1:1] = ["--info-fd", str(say_info.fileno())]
                passed.append(say_info.fileno())
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=stdin_file,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[*passed, *([] if self._ruleset is None else [self._ruleset])],
                env=_ENVIRONMENT,
                cwd="/",
                **user,
            )
            held.callback(_end, process, info)
            say_ready.close()
            say_info.close()
            if not _readable(ready, START_LIMIT_S) or ready.read(1) != b"1":  # a process not confined closes the pipe
                _end(process, info)
                reason = _content(stderr).decode(errors="replace").strip()[-300:]
                raise SandboxError(f"{self.rung} did not start the program, ended with {process.returncode}: {reason}")
            began = time.monotonic()
            in_time = self._wait(process, began + wall_s)
            seconds = time.monotonic() - began
            _end(process, info)
            code = process.returncode if in_time else None
            if wrapped and code is not None and code > 128:
                code = 128 - code  # bubblewrap's encoding of a signal
            outputs = {"stdout": _content(stdout), "stderr": _content(stderr), "results": _content(results)}
        return Finished(code=code, seconds=seconds, **outputs)

    def _restrictions(self, wall_s: float) -> dict[str, Any]:
        """Return the fields of a job for `rlhf.rewards.sandbox.program.confine`."""
        wrapped, changes_user = self.rung == "bubblewrap", self._changes_user
        return {
            "memory_bytes": self._memory_bytes,
            "output_bytes": OUTPUT_BYTES,
            "cpu_s": int(wall_s) + 1,
            "uid": secrets.choice(PROGRAM_USERS) if changes_user else None,
            "threads": MAX_THREADS if wrapped or changes_user else None,  # else all the user's processes would count
            "parent": None if wrapped else os.getpid(),
            "filter": self._filter,
            "ruleset": self._ruleset,
        }

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Return whether the process ended before the deadline without too many threads."""
        pidfd = pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0:
                if poll.poll(1000 * min(left, _THREAD_CHECK_S)):
                    return True
                if self.rung != "bubblewrap" and not self._changes_user and _num_threads(process.pid) > MAX_THREADS:
                    return False
            return False
        finally:
            os.close(pidfd)


def _interpreters() -> list[str]:
    """Return this process's and the system's interpreter, first the interpreters readable by an unprivileged user."""
    base = getattr(sys, "_base_executable", sys.executable)
    paths = [path for path in dict.fromkeys([base, "/usr/bin/python3"]) if os.path.exists(path)]
    return sorted(paths, key=lambda path: not _everybody_reads(path))


def _may_change_user() -> bool:
    """Return whether this process is root with CAP_SETGID and CAP_SETUID, often dropped in containers."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return os.geteuid() == 0 and effective is not None and int(effective[1], 16) & 0xC0 == 0xC0


def _everybody_reads(name: str) -> bool:
    path = Path(name).resolve()
    return path.stat().st_mode & 0o5 == 0o5 and all(parent.stat().st_mode & 0o1 for parent in path.parents)


def namespaces(readable: Sequence[str], *, writable: str | None = None) -> list[str]:
    """Return arguments of bubblewrap for a process with nothing shared, started in the writable folder."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--cap-drop", "ALL"]
    options += ["--dev", "/dev", "--remount-ro", "/dev"]
    for path in readable:
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path) and not path.startswith("/dev/"):
            options += ["--ro-bind", path, path]
    options += ["--bind", writable, writable] if writable else []
    return [*options, "--remount-ro", "/", "--chdir", writable or "/", "--"]


def _memory(content: bytes | None = None) -> io.FileIO:
    """Return a file in memory: an empty file, or a sealed file with constant content."""
    file = io.FileIO(memfd("sandbox", is_sealable=True), "r+")
    if content is not None:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        file.seek(0)
        seal(file.fileno())
    return file


def _content(file: io.FileIO) -> bytes:
    return os.pread(file.fileno(), OUTPUT_BYTES, 0)


def _pipe(held: ExitStack) -> tuple[io.FileIO, io.FileIO]:
    read, write = os.pipe()
    return held.enter_context(io.FileIO(read, "r")), held.enter_context(io.FileIO(write, "w"))


def _num_threads(pid: int) -> int:
    with contextlib.suppress(OSError):  # the process may have just ended
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _end(process: subprocess.Popen[bytes], info: io.FileIO) -> None:
    """Kill the rest of the process tree from the inside out, and wait for the end."""
    if process.poll() is not None:
        return
    inner = re.search(rb'"child-pid": (\d+)', os.read(info.fileno(), 4096)) if _readable(info, 0.0) else None
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(inner[1]) if inner else process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_WAIT_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise SandboxError(f"process {process.pid} still runs {KILL_WAIT_S:g} s after it was killed") from error


def _readable(file: io.FileIO, limit_s: float) -> bool:
    poll = select.poll()  # select.select takes no file descriptor above 1023
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * limit_s))
