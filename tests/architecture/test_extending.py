"""docs/extending.md, step by step: files are written, changes made and commands run, in a folder of their own."""

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
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
MODULES = {"python": [], "rlhf": ["-m", "rlhf.cli"], "pip": ["-m", "pip"]}
# Nothing is fetched, and the environment of the tests stays as it is.
OPTIONS = {"pip install": ["--quiet", "--no-build-isolation", "--no-deps", "--target", "installed"]}


@dataclass(frozen=True, slots=True)
class Step:
    """A block of a page, and the last file named in the text before the block."""

    kind: str
    path: str
    text: str


def steps(chapter: str) -> Iterator[Step]:
    """Return the steps of a chapter, in order."""
    start = PAGE.index(f"## {chapter}")
    end = PAGE.find("\n## ", start)
    text = PAGE[start : len(PAGE) if end < 0 else end]
    for match in BLOCK.finditer(text):
        named = re.findall(r"(?:Write|In)\s+`([^`]+)`:", text[: match.start()])
        yield Step(match[2], named[-1] if named else "", textwrap.dedent(match[3]))


def changed(text: str, change: str) -> str:
    """Return the text after a diff: lines without `+` must occur once, and are replaced by the lines without `-`."""
    lines = change.splitlines(keepends=True)
    old = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def follow(chapter: str, folder: Path, *, trains: bool = False, code: Path = ROOT) -> list[str]:
    """Follow the chapter and return the output of all commands. `trains`: also commands that train."""
    outputs = []
    for step in steps(chapter):
        path = folder / step.path
        if step.kind in ("python", "yaml", "json", "toml"):
            path.write_text(step.text, encoding="utf-8")
        elif step.kind == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), step.text), encoding="utf-8")
        else:
            assert step.kind == "console"
            lines = [line for line in step.text.splitlines() if trains or not line.startswith("rlhf train")]
            outputs += [run(line, folder, code) for line in lines]
    return outputs


def python(folder: Path, *words: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{code}:{folder / 'installed'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def run(line: str, folder: Path, code: Path = ROOT) -> str:
    """Return the output of a successful command."""
    words, _, output = line.partition(" > ")
    program, *rest = shlex.split(words)
    rest += OPTIONS.get(f"{program} {rest[0]}", [])
    done = python(folder, *MODULES[program], *rest, code=code)
    assert done.returncode == 0, f"{line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    if output:
        (folder / output).write_text(done.stdout, encoding="utf-8")
    return done.stdout


def test_a_script_passes_its_objects(tmp_path: Path) -> None:
    """No process imports the script, which has no guard."""
    for step in steps("Add a reward"):
        if step.kind in ("yaml", "json"):
            (tmp_path / step.path).write_text(step.text, encoding="utf-8")
    script = next(step.text for step in steps("Run from a Python script") if step.path == "train_closeness.py")
    scoring = script.replace("rlhf.train(", "scored = rlhf.reward(file='responses.jsonl', config=")
    (tmp_path / "score.py").write_text(f"{scoring}print(scored.rows[1].score)\n", encoding="utf-8")
    done = python(tmp_path, "score.py")
    assert done.stdout == f"{(5 / 6) ** 2}\n", done.stderr  # one of six characters is wrong, and the power is 2


def test_code_of_a_file_and_of_a_package(tmp_path: Path) -> None:
    """One of the six characters of `3,6,11` is wrong. After the installation, the files of the earlier chapters are
    deleted."""
    (plan,) = follow("Add an algorithm", tmp_path)
    assert f"ranked: {tmp_path / 'my_algorithms.py'}:Ranked -> runs/ranked" in plan
    (scores,) = follow("Add a reward", tmp_path)
    assert "0.83" in scores
    assert "1.0" in scores
    follow("Share code as a package", tmp_path)
    for file in ("my_algorithms.py", "my_rewards.py", "my_trackers.py"):
        (tmp_path / file).unlink()
    for folder in (*tmp_path.glob("*.egg-info"), tmp_path / "build"):
        shutil.rmtree(folder)
    assert "packaged: ranked -> runs/packaged" in run("rlhf plan packaged.yaml", tmp_path)


def test_an_algorithm_of_the_repository(tmp_path: Path) -> None:
    for name in ("rlhf", "actors", "configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    written = {step.path: step.text for step in steps("Add an algorithm") if step.kind != "console"}
    (tmp_path / "rlhf" / "algorithms" / "ranked.py").write_text(written["my_algorithms.py"], encoding="utf-8")
    (tmp_path / "ranked.yaml").write_text(written["ranked.yaml"], encoding="utf-8")
    _, plan = follow("Add an algorithm to this repository", tmp_path, code=tmp_path)
    assert "ranked: ranked -> runs/ranked" in plan
    assert "`algorithm` with `name: ranked`" in (tmp_path / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_page_adds_trains(tmp_path: Path) -> None:
    for chapter in ("Add an algorithm", "Add a reward", "Share code as a package"):
        follow(chapter, tmp_path, trains=True)
    for name in ("ranked", "closeness", "packaged"):
        assert (tmp_path / "runs" / name / "final" / "config.json").exists()
    lines = (tmp_path / "runs" / "packaged" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "2"]
