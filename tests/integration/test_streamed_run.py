"""A streamed run trains on finished groups while later groups are sampled. Results equal a run in turns up to
rounding.

The reward is slow, so that groups finish one after another. Sums are accumulated in the order of completion, so each
run rounds differently. Epsilon is large, so that Adam does not amplify the rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.faults import kill_all, wait_for
from tests.integration.recipes import rows, start, train_here, without_clocks, write_config

REWARD = """\
import time


def reward(prompt, response):
    time.sleep(0.05)
    return float(len(response) % 3)
"""
GRPO: dict[str, Any] = {
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05}},
    "data": {"eval": None},
    "eval": None,
    "rewards": {"mine": {"function": "mine.py:reward"}},
    "train": {"steps": 3, "checkpoint_every": 1, "eps": 1e-3},
}


def run_config(folder: Path, name: str, *, streamed: bool) -> Path:
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    changes = {**GRPO, "train": {**GRPO["train"], "streamed": streamed}}
    return write_config(folder / f"{name}.yaml", {**changes, "run": {"name": name, "dir": str(folder), "seed": 3}})


def equal_up_to_rounding(one: Path, other: Path) -> None:
    """The same responses and scores in the same order; metrics and weights to 1e-4 of their size."""
    for step in (1, 2, 3):
        samples = [
            [json.loads(line) for line in (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]
            for run in (one, other)
        ]
        key = ("group", "sample", "response", "score")
        assert len({tuple(tuple(str(row.get(name)) for name in key) for row in found) for found in samples}) == 1
    for expected, found in zip(*(without_clocks(rows(run)) for run in (one, other)), strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - {"update/tokens/total"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, other)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def updates_during_rollouts(run: Path) -> int:
    """Return the number of update spans that began before the end of the step's rollouts."""
    spans = [event for event in json.loads((run / "timeline.json").read_text()) if event["ph"] == "X"]
    rollouts = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["name"] == "rollouts"]
    return sum(start < span["ts"] < end for span in spans if span["name"] == "update" for start, end in rollouts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_streamed_run_equals_the_run_in_turns_up_to_rounding_also_killed_and_resumed(
    kept_engines: None, tmp_path: Path
) -> None:
    for name, streamed in (("in_turns", False), ("streamed", True)):
        train_here(run_config(tmp_path, name, streamed=streamed))
    assert updates_during_rollouts(tmp_path / "in_turns") == 0
    assert updates_during_rollouts(tmp_path / "streamed") >= 3
    for row in rows(tmp_path / "streamed"):
        assert row["time/trainer_waits_s"] < row["time/rollouts_s"]
    killed, run = run_config(tmp_path, "killed", streamed=True), tmp_path / "killed"
    process = start(killed)
    wait_for(run / "metrics.jsonl", 1, timeout_s=240)  # step 1: step 2 is under way
    kill_all(process.pid)
    process.wait(timeout=30)
    train_here(killed, "--resume", "auto")
    for found in (tmp_path / "streamed", run):
        equal_up_to_rounding(tmp_path / "in_turns", found)
