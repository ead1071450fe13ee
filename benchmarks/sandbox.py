"""Show how hostile programs end in the sandbox, and how fast harmless programs run.

    python benchmarks/sandbox.py [--limit 0.5] [--runs 100]

The programs are the programs of the sandbox's test, with real targets: a readable file, a listening port, an abstract
socket and this process. The output names each rung that this machine lacks. The outcome of a program is an exit code, a
signal, or the limit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rlhf.rewards.sandbox.run import Finished, Rung, Sandbox, SandboxError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "rewards"))
from hostile_programs import PROGRAMS  # type: ignore[import-not-found]

RUNGS: tuple[Rung, ...] = ("bubblewrap", "landlock")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=0.5, help="seconds that a program may take")
    parser.add_argument("--runs", type=int, default=100, help="of print(1), for the speed")
    arguments = parser.parse_args()
    sandboxes = {}
    for rung in RUNGS:
        try:
            sandboxes[rung] = Sandbox(rungs=[rung], memory_mib=256)
        except SandboxError as error:
            sys.stdout.write(f"NOT MEASURED: {error}\n\n")
    folder = Path(tempfile.mkdtemp())
    try:
        hostile(sandboxes, folder, limit_s=arguments.limit)
    finally:
        shutil.rmtree(folder)
    sys.stdout.write("\n| rung | interpreter | ms, median | ms, fastest |\n|---|---|---|---|\n")
    for rung, sandbox in sandboxes.items():
        times = [1000 * timed(sandbox, "print(1)", limit_s=10.0)[1] for _ in range(arguments.runs)]
        sys.stdout.write(f"| {rung} | {sandbox.python} | {statistics.median(times):.0f} | {min(times):.0f} |\n")


def hostile(sandboxes: dict[Rung, Sandbox], folder: Path, *, limit_s: float) -> None:
    """Print one line for each program."""
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    name = f"sandbox-benchmark-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        port = listener.getsockname()[1]
        values = {"FOLDER": folder, "SECRET": secret, "PID": os.getpid(), "PORT": port, "NAME": name}
        sys.stdout.write(f"| program | {' | '.join(sandboxes)} | left behind |\n|---|{'---|' * len(sandboxes)}---|\n")
        for title, text in PROGRAMS.items():
            program = string.Template(text).substitute(values)
            cells = []
            for sandbox in sandboxes.values():
                done, seconds = timed(sandbox, program, limit_s=limit_s)
                cells.append(f"{outcome(done)}, {seconds:.2f} s")
            left = len(psutil.Process().children(recursive=True)) + len(os.listdir(folder)) - 1
            sys.stdout.write(f"| {title} | {' | '.join(cells)} | {left or 'nothing'} |\n")
            sys.stdout.flush()


def timed(sandbox: Sandbox, program: str, *, limit_s: float) -> tuple[Finished, float]:
    """Return how a program ended, and the seconds of the whole call."""
    began = time.monotonic()
    done = sandbox.run(program, wall_s=limit_s, stdin=b"input")
    return done, time.monotonic() - began


def outcome(done: Finished) -> str:
    """Describe the outcome in words, with the reason in a traceback."""
    if b"ESCAPED" in done.stdout:
        return "ESCAPED"
    if done.code is None:
        return "stopped at a limit"
    if done.code < 0:
        return f"killed by signal {-done.code}"
    error = done.stderr.decode(errors="replace").strip().split("\n")[-1]
    known = re.match(r"(\w+)(?:: (?:\[Errno \d+\] )?([A-Z][\w' -]*\w))?", error)
    if done.code != 1 or known is None:
        return f"got nothing, exit code {done.code}"
    return f"{known[1]}: {known[2].split(' - ')[0].removesuffix(' in')}" if known[2] else known[1]


if __name__ == "__main__":
    main()
