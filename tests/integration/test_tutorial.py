"""docs/tutorial.md to the letter: the page's files are written, the commands run, and the model has learned."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.files.load import load

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:Write `([^`]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def follow(folder: Path) -> dict[str, str]:
    """Write the files and run the commands of the page in `folder`; return the output of each command."""
    outputs = {}
    for name, kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if name:
            (folder / name).write_text(text, encoding="utf-8")
            continue
        assert kind == "console"
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            module = {"python": [], "rlhf": ["-m", "rlhf.cli"]}[program]
            done = subprocess.run(
                [sys.executable, *module, *arguments],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=800,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            outputs[line] = done.stdout
    return outputs


def test_the_configuration_of_the_tutorial_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, _, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if name:
            Path(name).write_text(text, encoding="utf-8")
    assert list(load("backwards.yaml").stages) == ["sft", "grpo"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    outputs = follow(tmp_path)
    assert "checked: `rlhf train` accepts them" in outputs["rlhf plan backwards.yaml"]
    run = tmp_path / "runs" / "backwards" / "grpo"
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    scores = [row["rewards/score/mean"] for row in rows if "rewards/score/mean" in row]
    assert sum(scores[-5:]) > sum(scores[:5])
    assert (run / "final" / "config.json").exists()
    assert (run / "report.html").exists()
    (answers,) = (output for line, output in outputs.items() if line.startswith("rlhf generate"))
    assert len(answers.splitlines()) == 2
