"""docs/architecture.md lists the files from the command to the loss in the order of a traced run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 16


def test_the_listed_files_are_those_on_the_stack_of_a_run() -> None:
    command = [sys.executable, "-m", "tests.architecture.trace_to_the_loss"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    traced = json.loads(done.stdout.splitlines()[-1])
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chapter = page.split("## From the command to the loss\n")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. `([\w/]+\.py)`: ", chapter, re.MULTILINE) == traced
    assert len(traced) <= MOST_FILES
