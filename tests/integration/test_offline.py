"""Real runs go from fixed data to rollouts: imitation, a reward model, and PPO on that model, as stages of one run.

A pipeline killed in the second stage and resumed equals the unbroken pipeline.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.tracking.metrics.declarations import expected_metrics
from tests.integration.faults import kill_all, wait_for
from tests.integration.offline_pipeline import PIPELINE
from tests.integration.recipes import rows, start, train, train_here, without_clocks, write_config


def config(folder: Path, name: str, *, stages: tuple[str, ...] = ("dpo", "reward", "ppo")) -> Path:
    chosen = {**PIPELINE, "stages": {stage: PIPELINE["stages"][stage] for stage in stages}}
    return write_config(folder / f"{name}.yaml", {"run": {"name": name, "dir": str(folder), "seed": 3}}, chosen)


@pytest.fixture(scope="module")
def unbroken(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted pipeline."""
    folder = tmp_path_factory.mktemp("offline")
    train_here(config(folder, "unbroken"))
    return folder / "unbroken"


@pytest.mark.timeout(600)
def test_every_stage_has_its_metrics_and_its_model(unbroken: Path) -> None:
    for stage, steps in (("dpo", 4), ("reward", 40), ("ppo", 1)):
        found = rows(unbroken / stage)
        assert found[-1]["step"] == steps
        assert (unbroken / stage / "final" / "model.safetensors").exists()
    always = {name for name in expected_metrics(["preference"]) if "<" not in name}
    assert always <= set(rows(unbroken / "dpo")[-1])
    assert always <= set(rows(unbroken / "reward")[-1])
    assert rows(unbroken / "dpo")[0]["eval/heldout/margin"] == 0.0  # the policy still equals the reference
    assert rows(unbroken / "dpo")[-1]["eval/heldout/margin"] > 0.0
    assert rows(unbroken / "reward")[-1]["preference/accuracy/mean"] > 0.7
    assert rows(unbroken / "ppo")[-1]["rewards/preference/mean"] == rows(unbroken / "ppo")[-1]["rewards/score/mean"]
    cached = list((unbroken.parent / "reference_logprobs").iterdir())
    assert len(cached) == 2  # one file for the training set, one for the evaluation set


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_killed_in_its_second_stage_equals_an_unbroken_one(unbroken: Path) -> None:
    folder = unbroken.parent
    again = config(folder, "killed", stages=("dpo", "reward"))
    process = start(again)
    wait_for(folder / "killed" / "reward" / "metrics.jsonl", 8, timeout_s=200)
    kill_all(process.pid)
    cached = {file: os.stat(file).st_mtime_ns for file in (folder / "reference_logprobs").iterdir()}
    train(again, "--resume", "auto")
    for stage in ("dpo", "reward"):
        assert without_clocks(rows(folder / "killed" / stage)) == without_clocks(rows(unbroken / stage))
        ours, theirs = (load_file(f / stage / "final" / "model.safetensors") for f in (folder / "killed", unbroken))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert cached == {file: os.stat(file).st_mtime_ns for file in (folder / "reference_logprobs").iterdir()}
    assert json.loads((folder / "killed" / "reward" / "environment.json").read_text())
