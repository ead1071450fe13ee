"""The controller, the roles and Ray are real, and engines and ranks are dummies: benchmarks/driver.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # starts Ray and seven processes with torch
def test_each_rank_receives_only_its_own_sequences_in_flight() -> None:
    arguments = ["--rollouts", "128", "--tokens", "16", "--ranks", "2", "--steps", "2", "--mode", "in_flight"]
    done = subprocess.run(
        [sys.executable, "benchmarks/driver.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["in_flight", "16", "2"]
    assert len(cells[4].split(",")) == 2  # the driver's memory after each of two steps
    assert 1.0 <= float(cells[5]) < 1.9  # a rank with both ranks' bytes would have the ratio 2
