"""Rollouts run ahead of training within the bound of the lag, and a killed run continues exactly."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.cli import main
from tests.integration.faults import kill_all, wait_for
from tests.integration.recipes import one_thread, rows, start, train_here, without_clocks, write_config

AHEAD: dict[str, Any] = {
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05}, "correction": {"preset": "token_tis"}},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "rollouts": {"max_staleness": 2},
    "train": {"steps": 6},
    "cluster": {"roles": one_thread("policy", "reference", "rollout")},
}


def run_config(folder: Path, name: str, **rollouts: Any) -> Path:
    run = {"name": name, "dir": str(folder), "seed": 3}
    return write_config(folder / f"{name}.yaml", {**AHEAD, "run": run, "rollouts": {**AHEAD["rollouts"], **rollouts}})


@pytest.mark.timeout(600)
def test_batches_lag_as_configured_and_a_killed_run_equals_an_unbroken_one(kept_engines: None, tmp_path: Path) -> None:
    """The folder of responses is lost too, so responses of batches ahead can only come from the checkpoint."""
    train_here(run_config(tmp_path, "unbroken"))
    killed, run = run_config(tmp_path, "killed"), tmp_path / "killed"
    process = start(killed)
    wait_for(run / "metrics.jsonl", 4, timeout_s=240)  # steps 0 to 3: past the checkpoint of step 2
    kill_all(process.pid)
    process.wait(timeout=30)
    with tarfile.open(run / "checkpoints" / "step_000002" / "rollouts" / "groups.tar") as archive:
        assert len(archive.getnames()) == 2 * 8  # two batches of eight prompts
    for own in run.glob(".own-*"):
        shutil.rmtree(own)
    train_here(killed, "--resume", "auto")

    expected, resumed = (without_clocks(rows(tmp_path / name)) for name in ("unbroken", "killed"))
    assert [row["experience/policy_lag/max"] for row in expected[1:]] == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert resumed == expected
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert main(["doctor", str(run)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_in_flight_trains_every_prompt_once(kept_engines: None, tmp_path: Path) -> None:
    config, run = (
        run_config(tmp_path, "flight", weight_updates="in_flight", batch_order="completion"),
        tmp_path / "flight",
    )
    process = start(config)
    wait_for(run / "metrics.jsonl", 4, timeout_s=240)
    kill_all(process.pid)
    process.wait(timeout=30)
    train_here(config, "--resume", "auto")

    ledger = [json.loads(line) for line in (run / "groups.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in ledger] == list(range(1, 7))
    groups = [group for line in ledger for group in line["trained"]["group_id"]]
    assert sorted(groups) == list(range(len(groups)))
    assert max(row["experience/policy_lag/max"] for row in rows(run)[1:]) == 2.0
    assert main(["doctor", str(run)]) == 0
