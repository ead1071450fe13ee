"""Rollouts that run ahead of training: the lag is as configured, and a killed run goes on bit for bit."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.recipes import rows, start, train, without_clocks, write_config
from tests.integration.test_online import kill_all, wait_for

AHEAD: dict[str, Any] = {
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05}, "correction": {"preset": "token_tis"}},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "rollouts": {"max_staleness": 2},
    "train": {"steps": 6},
}


def run_config(folder: Path, name: str) -> Path:
    return write_config(folder / f"{name}.yaml", {**AHEAD, "run": {"name": name, "dir": str(folder), "seed": 3}})


@pytest.mark.timeout(600)
def test_batches_lag_as_configured_and_a_killed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    """The folder of responses is lost too, so those of the batches ahead can only come from the checkpoint."""
    train(run_config(tmp_path, "unbroken"))
    killed, run = run_config(tmp_path, "killed"), tmp_path / "killed"
    process = start(killed)
    wait_for(run / "metrics.jsonl", 4, timeout_s=240)  # steps 0 to 3: past the checkpoint of step 2
    kill_all(process.pid)
    process.wait(timeout=30)
    with tarfile.open(run / "checkpoints" / "step_000002" / "rollouts" / "groups.tar") as archive:
        assert len(archive.getnames()) == 2 * 8  # two batches of eight prompts
    for own in run.glob(".own-*"):
        shutil.rmtree(own)
    train(killed, "--resume", "auto")

    expected, resumed = (without_clocks(rows(tmp_path / name)) for name in ("unbroken", "killed"))
    assert [row["experience/policy_lag/max"] for row in expected[1:]] == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert resumed == expected
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
