"""The program of a sandboxed process: confine itself, report success, and run a model's program.

`rlhf.rewards.sandbox.run` passes this module's source to an interpreter, so no file is needed there. This module must
use only the standard library and run on Python 3.8. All code after `confine` may be controlled by the model's program:
never hold an expected answer here.
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Job = dict[str, Any]


def confine(job: Job) -> None:
    """Apply limits and restrictions to this process, for good."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = job["memory_bytes"] if most == resource.RLIM_INFINITY else min(job["memory_bytes"], most)
    for name, limit in (
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("NOFILE", 64),
        ("FSIZE", job["output_bytes"]),
        ("CPU", job["cpu_s"]),
        ("AS", memory),
    ):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    if job["threads"] is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (job["threads"], job["threads"]))
    if job["filter"] is not None:
        _apply_restrictions(job)


def _apply_restrictions(job: Job) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def check(call: str, result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")

    if job["parent"] is not None:
        check("PR_SET_PDEATHSIG", libc.prctl(1, 9, 0, 0, 0))
        if os.getppid() != job["parent"]:
            os._exit(1)
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        check("capset", libc.capset(header, (ctypes.c_uint32 * 6)()))
    check("PR_SET_NO_NEW_PRIVS", libc.prctl(38, 1, 0, 0, 0))
    if job["ruleset"] is not None:
        check("landlock_restrict_self", libc.syscall(446, job["ruleset"], 0))
        os.close(job["ruleset"])

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    code = bytes.fromhex(job["filter"])
    check("PR_SET_SECCOMP", libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0))


def run_script(program: str) -> None:
    """Run a script as `python program.py` would, with standard input and output."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(_compiled(program, "<program>"), module.__dict__)


def _compiled(code: str, name: str) -> types.CodeType:
    """Compile code without the __future__ imports of this file."""
    return compile(code, name, "exec", dont_inherit=True)


def run_tests(job: Job, results: int) -> None:
    """Import the program as `solution`, then answer each test on a line: a value, or the mark for a passed test."""
    import json  # imported here, since the import is half of a script's start time

    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    write, dumps = os.write, json.dumps  # saved before the program can replace them
    statements = [_compiled(code, "<tests>") for code in job["statements"]]
    tests = _tests(job, statements, module.__dict__, execute=exec)
    exec(_compiled(job["program"], "<program>"), module.__dict__)
    for test in tests:
        try:
            line = dumps(test())
        except BaseException:  # noqa: BLE001  a test that fails, in whatever way, is one that did not pass
            line = "null"
        write(results, (line + "\n").encode())


def _tests(
    job: Job, statements: list[types.CodeType], space: Job, *, execute: Callable[..., None]
) -> Iterator[Callable[[], object]]:
    if job["function"] is not None:
        name = job["function"]
        target = space[name] if name in space else getattr(space["Solution"](), name)
        for arguments in job["calls"]:
            yield lambda: {"value": target(*arguments)}  # noqa: B023  called before the next is made
        return
    for code in statements:
        yield lambda: (execute(code, space), job["mark"])[1]  # type: ignore[func-returns-value]  # noqa: B023
    for name in job["test_functions"]:
        yield lambda: (space[name](), job["mark"])[1]  # noqa: B023


def main() -> None:
    """Run with three file descriptors as arguments: the job, a pipe for the confinement signal, and the results."""
    job_fd, ready, results = (int(argument) for argument in sys.argv[1:4])
    with open(job_fd, "rb") as file:
        job = marshal.load(file)
    import _sitebuiltins

    builtins.exit = _sitebuiltins.Quitter("exit", "")  # absent without `site`
    builtins.quit = _sitebuiltins.Quitter("quit", "")
    sys.argv[:] = ["program"]
    sys.path[:] = [entry for entry in sys.path if entry]
    confine(job)
    os.write(ready, b"1")
    os.close(ready)
    if job["mark"] is None:
        os.close(results)
        run_script(job["program"])
    else:
        run_tests(job, results)


if __name__ == "__main__":
    main()
