"""Every sandbox of this machine contains hostile programs, bounds them, and leaves nothing behind.

A missing kind of sandbox is a skip with a reason. The ladder must find a sandbox that works.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import psutil
import pytest

from rlhf.extensions import CodeSource
from rlhf.rewards.processes.pool import RewardPool
from rlhf.rewards.sandbox import confinement
from rlhf.rewards.sandbox.run import MAX_THREADS, OUTPUT_BYTES, Rung, Sandbox, SandboxError
from tests.fixtures.rewards.hostile_programs import PROGRAMS

LIMIT_S = 0.5
NAME = f"sandbox-test-{os.getpid()}"


@pytest.fixture(scope="module", params=["landlock", "bubblewrap"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return Sandbox(rungs=[request.param], memory_mib=256)
    except SandboxError as error:
        if has(request.param):
            raise
        pytest.skip(f"THE RUNG {request.param} IS NOT TESTED HERE: {error}")


def has(rung: Rung) -> bool:
    """Return whether the machine has the tools of a sandbox. The sandbox must work then."""
    if rung == "bubblewrap":
        return shutil.which("bwrap") is not None
    return bool(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) > 0)  # Landlock's version


class Host:
    """The targets of the programs, and the targets' state before an attack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret"
        folder.chmod(0o777)
        self.secret.write_text("secret")
        self.secret.chmod(0o666)
        self.listeners = [socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(type=socket.SOCK_DGRAM)]
        self.listeners[0].bind(("127.0.0.1", 0))
        self.port = self.listeners[0].getsockname()[1]
        self.listeners[1].bind("\0" + NAME)
        self.listeners[2].bind(("127.0.0.1", self.port))
        for listener in self.listeners:
            listener.setblocking(False)
            if listener.type == socket.SOCK_STREAM:
                listener.listen()
        self.before = self.state()
        self.children = set(psutil.Process().children())  # such as a Ray of other tests

    def state(self) -> tuple[object, ...]:
        files, status = [path.name for path in self.folder.iterdir()], self.secret.stat()
        limits = psutil.Process().rlimit(psutil.RLIMIT_NOFILE), os.getpriority(os.PRIO_PROCESS, 0)
        return files, self.secret.read_text(), status.st_mode, status.st_nlink, status.st_mtime_ns, *limits

    def program(self, name: str) -> str:
        return string.Template(PROGRAMS[name]).substitute(
            FOLDER=self.folder, SECRET=self.secret, PID=os.getpid(), PORT=self.port, NAME=NAME
        )

    def check(self) -> None:
        """Assert that no target has changed, nobody has connected, and no process is left."""
        assert self.state() == self.before
        assert not Path("/dev/shm/escaped").exists()
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
        assert set(psutil.Process().children()) <= self.children


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    temp = Path(tempfile.gettempdir())
    for folder in (tmp_path, *tmp_path.parents):  # so that only the sandbox stands in the way
        if temp in folder.parents:
            folder.chmod(0o777)
    monkeypatch.setenv("HOSTILE_TEST_SECRET", "secret")
    made = Host(tmp_path)
    yield made
    Path("/dev/shm/escaped").unlink(missing_ok=True)
    for listener in made.listeners:
        listener.close()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sandbox", ["landlock", pytest.param("bubblewrap", marks=pytest.mark.slow)], indirect=True)
def test_hostile_programs_are_contained(name: str, sandbox: Sandbox, host: Host) -> None:
    done = sandbox.run(host.program(name), wall_s=LIMIT_S, stdin=b"input")
    assert b"ESCAPED" not in done.stdout
    assert done.seconds < 30.0  # without the limit, programs that sleep would take a minute or more
    assert len(done.stdout) <= OUTPUT_BYTES
    assert len(done.stderr) <= OUTPUT_BYTES
    host.check()


# These programs are harmless, and must succeed without a sandbox. Otherwise the test above would show nothing.
FEASIBLE = (
    "exec of a shell", "file in memory", "renames", "changes times", "symbolic link", "hard link", "dots in a path",
    "reads a file of the user", "lists a folder of the user", "walks through /proc", "secrets in /proc", "TCP", "UDP",
    "abstract socket", "socket in a folder", "listens", "limits of the parent", "reads /etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("name", FEASIBLE)
def test_without_a_sandbox_they_succeed(name: str, host: Host) -> None:
    program = host.program(name).replace("(3, 3)", "r.getrlimit(r.RLIMIT_NOFILE)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20)
    assert b"ESCAPED" in done.stdout, done.stderr


def test_what_a_program_may_do(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may be built for an older C library."""
    for module, name in ((os, "memfd_create"), (fcntl, "F_ADD_SEALS"), (os, "pidfd_open")):
        monkeypatch.delattr(module, name, raising=False)
    program = """
import asyncio, collections, decimal, math, random, re, resource, sys, threading, time
async def later():
    await asyncio.sleep(0.01)
    return 5
print(asyncio.run(later()))
threading.stack_size(2**26)
thread = threading.Thread(target=lambda: print('thread'))
thread.start(); thread.join()
print(input(), sys.stdin.read())
print(open('/dev/null').read() == '', __name__, sys.argv)
resource.setrlimit(resource.RLIMIT_STACK, (2**26, 2**26))
print('to stderr', file=sys.stderr)
exit(3)
"""
    done = sandbox.run(program, wall_s=10.0, stdin="größer\nmore".encode())
    assert done.stdout.decode().split("\n") == ["5", "thread", "größer more", "True __main__ ['program']", ""]
    assert done.stderr == b"to stderr\n"
    assert done.code == 3


FLOOD = """
import threading
threading.stack_size(32768)
count, wait = 1, threading.Event()
try:
    while count < 1000:
        threading.Thread(target=wait.wait, daemon=True).start()
        count += 1
except RuntimeError:
    pass
print(count, flush=True)
import os; os._exit(0)
"""


def test_a_program_has_no_more_threads_than_its_limit(sandbox: Sandbox) -> None:
    """The limit also holds between two checks: a flood of threads takes only a few milliseconds."""
    if os.geteuid() != 0:
        pytest.skip("without root the user's other processes would count: threads are looked at now and then")
    done = sandbox.run(FLOOD, wall_s=10.0)
    assert done.code == 0, done.stderr
    assert int(done.stdout) <= MAX_THREADS


def test_how_programs_end_in_several_threads_with_one_order_of_sets(sandbox: Sandbox) -> None:
    assert sandbox.run("pass", wall_s=5.0).code == 0
    assert sandbox.run("1 / 0", wall_s=5.0).code == 1
    assert sandbox.run("def f(:", wall_s=5.0).code == 1
    assert sandbox.run("def f(x: int): pass\nprint(f.__annotations__)", wall_s=5.0).stdout == b"{'x': <class 'int'>}\n"
    assert sandbox.run("\ud800", wall_s=5.0).code == 1
    assert sandbox.run("import os; os.abort()", wall_s=5.0).code in (-signal.SIGABRT, -signal.SIGSEGV)
    late = sandbox.run("print('early', flush=True)\nwhile True: pass", wall_s=1.0)
    assert (late.code, late.stdout) == (None, b"early\n")
    programs = [f"print({i})" for i in range(8)] + ["print(set('abcdefgh'))"] * 4
    with ThreadPoolExecutor(8) as threads:
        outputs = [done.stdout for done in threads.map(partial(sandbox.run, wall_s=10.0), programs)]
    assert [int(output) for output in outputs[:8]] == [*range(8)]
    assert len({*outputs[8:]}) == 1


def test_a_program_ends_with_its_caller(sandbox: Sandbox) -> None:
    code = (
        f"from rlhf.rewards.sandbox.run import Sandbox; s = Sandbox(rungs=[{sandbox.rung!r}])\n"
        "print('go', flush=True); s.run('import time; time.sleep(200)', wall_s=200.0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"go\n"
        started: list[psutil.Process] = []
        deadline = time.monotonic() + 60.0
        while not any("print" not in p.cmdline() and "time.sleep" not in p.cmdline() for p in started):
            assert time.monotonic() < deadline, "the caller has started nothing"
            started = psutil.Process(caller.pid).children(recursive=True)
            time.sleep(0.02)
        caller.kill()
    _, alive = psutil.wait_procs(started, timeout=30.0)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_an_interpreter_with_its_packages() -> None:
    """Root runs an interpreter that only root may read, by Landlock and without capabilities."""
    made = Sandbox(python=sys.executable)
    assert made.rung in ("bubblewrap", "landlock")
    done = made.run("import numpy, sys; print(numpy.ones(2).sum(), sys.prefix)", wall_s=20.0)
    assert done.stdout.decode() == f"2.0 {sys.prefix}\n"
    assert made.run("print(open('/etc/shadow').read())", wall_s=10.0).code == 1


def test_a_missing_sandbox_is_refused_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    def refused(*_: object) -> int:
        raise confinement.Unavailable("the kernel has no Landlock")

    monkeypatch.setattr("rlhf.rewards.sandbox.run.landlock_ruleset", refused)
    with pytest.raises(SandboxError, match=r"apt-get install bubblewrap.*bwrap is not installed.*no Landlock"):
        Sandbox()
    unsafe = Sandbox(unsafe=True)
    assert unsafe.rung == "unsafe"
    assert unsafe.run("print(open('/etc/passwd').read()[:4])", wall_s=5.0).stdout == b"root\n"
    with pytest.raises(SandboxError, match="/nowhere/python"):
        Sandbox(python="/nowhere/python")


def test_the_filter_knows_its_numbers_and_no_call_that_changes_files_or_other_processes() -> None:
    """The numbers equal the machine's headers, if the machine has headers."""
    calls = "fork vfork clone3 execve socket connect kill unlink chmod ptrace mount"
    assert not confinement._CALLS.keys() & set(calls.split())
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("THE NUMBERS OF THE FILTER ARE NOT TESTED: no kernel headers (apt-get install linux-libc-dev)")
    defined = dict(re.findall(r"^#define (__NR_\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
    for name, (number, _) in confinement._CALLS.items():
        assert defined[f"__NR_{name}"] == str(number), name


def test_a_machine_of_unknown_calls_and_a_kernel_without_landlock_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def syscall(self, *_: object) -> int:
            ctypes.set_errno(38)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Old())
    with pytest.raises(confinement.Unavailable, match="Function not implemented"):
        confinement.landlock_ruleset(["/usr"], [])
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(confinement.Unavailable, match="riscv64"):
        confinement.seccomp_filter()


def test_in_a_reward_process() -> None:
    """A reward process limits memory and has a process group. The call is bounded, and a wrong program is no error."""
    source = CodeSource(path=None, name="code_tests", args={"test_s": 0.5, "limit_s": 1.0})
    with closing(RewardPool([source], timeout_s=20.0, memory_gib=2.0)) as pool:
        programs = ["print(int(input()) + 1)", "print(2)", "while True: pass", "import os\nwhile True: os.fork()"]
        columns = {"tests": [{"input": "1", "output": "2"}, {"input": "2", "output": "3"}]}
        outcome = pool.score(0, "p", [f"```python\n{program}\n```" for program in programs], columns)
        assert outcome.scores == (1.0, 0.0, 0.0, 0.0)
        (pid,) = pool.pids()
        assert psutil.Process(pid).children(recursive=True) == []
