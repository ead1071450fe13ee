"""Apply each fault to a copy of the tree and run the fault's tests: `python -m tests.mutations [WORD ...]`.

Words choose faults by name or file. The last column names the test that noticed the fault. The exit code is 1 if the
tests pass with a fault, or fail without a fault.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0  # limit for the tests of one fault


def main(words: Sequence[str]) -> int:
    """Print a row for each chosen fault. Return 1 if the tests missed a fault."""
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.name} {m.path}" for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy_tree(copy)
        sound = _run(copy, sorted({test for mutation in chosen for test in mutation.tests.split()}), stops=False)
        if sound:
            print(f"The tests fail without any fault: {', '.join(sound)}", file=sys.stderr)  # noqa: T201
            return 1
        survivors = [mutation for mutation in chosen if not _is_noticed(copy, mutation)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were noticed")  # noqa: T201
    return 1 if survivors else 0


def _copy_tree(copy: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def _is_noticed(copy: Path, mutation: Mutation) -> bool:
    path = copy / mutation.path
    sound = path.read_text()
    path.write_text(sound.replace(mutation.old, mutation.new))
    try:
        failed = _run(copy, mutation.tests.split(), stops=True)
    finally:
        path.write_text(sound)
    print(f"{'noticed ' if failed else 'SURVIVED'} | {mutation.name} | {', '.join(failed)}", flush=True)  # noqa: T201
    return bool(failed)


def _run(copy: Path, tests: Sequence[str], *, stops: bool) -> list[str]:
    """Return the failed tests, or the limit if the tests did not end. RuntimeError: pytest ran no test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-x"] if stops else [])]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return [f"no end after {LIMIT_S:g} s"]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
