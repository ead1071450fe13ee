"""docs/extending.md, step by step, in a copy of the repository: files are written, changes made, commands run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COPIED = ("rlhf", "actors", "configs", "docs", "tests", "pyproject.toml")
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Step:
    """A block, and the last file that the text before it names."""

    kind: str
    path: str
    text: str


def steps(chapter: str) -> Iterator[Step]:
    """Of one chapter, in order."""
    start = PAGE.index(f"## {chapter}")
    end = PAGE.find("\n## ", start)
    text = PAGE[start : len(PAGE) if end < 0 else end]
    for match in BLOCK.finditer(text):
        named = re.findall(r"(?:Write|In)\s+`([^`]+)`:", text[: match.start()])
        yield Step(match[2], named[-1] if named else "", textwrap.dedent(match[3]))


def changed(text: str, change: str) -> str:
    """The text with a change: its lines without `+` must stand there once, those without `-` take their place."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def follow(chapter: str, root: Path, *, trains: bool) -> list[str]:
    """Do what the chapter says; returns the output of its commands. `trains`: those that train too."""
    told = []
    for step in steps(chapter):
        path = root / step.path
        if step.kind in ("python", "yaml", "json"):
            path.write_text(step.text, encoding="utf-8")
        elif step.kind == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), step.text), encoding="utf-8")
        else:
            assert step.kind == "console"
            told += [ran(line, root) for line in step.text.splitlines() if trains or not line.startswith("rlhf train")]
    return told


def ran(line: str, root: Path) -> str:
    """The output of a command, run in the copy."""
    words, _, output = line.partition(" > ")
    program, *rest = shlex.split(words)
    modules = {"python": [], "pytest": ["-m", "pytest", "-p", "no:cacheprovider"], "rlhf": ["-m", "rlhf.cli"]}
    done = subprocess.run(
        [sys.executable, *modules[program], *rest],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    if output:
        (root / output).write_text(done.stdout, encoding="utf-8")
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository, to be changed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def test_an_algorithm_is_added_as_the_page_says(copy: Path) -> None:
    before = (copy / "docs" / "configuration.md").read_text(encoding="utf-8")
    _, plan, _ = follow("Add an algorithm", copy, trains=False)
    assert "algorithm" in plan
    assert "ranked" in plan
    assert (copy / "docs" / "configuration.md").read_text(encoding="utf-8") != before


def test_a_reward_is_added_as_the_page_says(copy: Path) -> None:
    """Of `3,6,11` one of six characters is wrong."""
    (told,) = follow("Add a reward", copy, trains=False)
    assert "0.83" in told
    assert "1.0" in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_page_adds_trains(copy: Path) -> None:
    follow("Add an algorithm", copy, trains=True)
    follow("Add a reward", copy, trains=True)
    assert (copy / "runs" / "ranked-tiny" / "final" / "config.json").exists()
    assert (copy / "runs" / "closeness" / "final" / "config.json").exists()
