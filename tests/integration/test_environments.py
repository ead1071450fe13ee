"""Whole runs on conversations: Ray, vLLM, DeepSpeed and environment processes, on the tiny model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.tracking.metrics.declarations import expected_metrics
from tests.integration.games import config, samples
from tests.integration.recipes import one_thread, rows, train, train_here

EXAMPLE = Path(__file__).parents[2] / "examples" / "tools" / "stock.yaml"


@pytest.mark.timeout(300)
def test_ppo_learns_from_conversations(ray_local: None, tmp_path: Path) -> None:
    train_here(config(tmp_path, "game", cluster={"roles": one_thread("policy", "critic", "reference", "rollout")}))
    found = rows(tmp_path / "game")
    always = expected_metrics(["online", "advantages", "reference", "critic", "environment", "eval"])
    plain = {name for name in always if "<" not in name}
    assert plain <= set(found[2]), sorted(plain - set(found[2]))
    for row in found[1:]:
        # Trainer and sampler agree about every sampled token, so both saw the same tokens at the same places.
        assert row["experience/rollout_logprob_diff/max"] < 1e-4
        assert 1.0 <= row["rollouts/turns/mean"] <= row["rollouts/turns/max"] == 3.0
        assert row["rollouts/environment_tokens/mean"] > 5.0
        assert row["rollouts/environment_errors/total"] == row["rollouts/environment_timeouts/total"] == 0.0
        assert row["rewards/digits/mean"] > 0.0
    assert "eval/heldout/won" in found[2]
    for sample in samples(tmp_path / "game", 2):
        turns = sample["turns"]
        assert sample["prompt"] == turns[0]["text"] == "<|user|>1-7?<|eos|><|assistant|>"
        assert [turn["role"] for turn in turns[1:]] == ["policy", "environment"] * (len(turns) // 2 - 1) + ["policy"]
        assert all(turn["sampled"] == (turn["role"] == "policy") for turn in turns)
        assert sum(turn["tokens"] for turn in turns if turn["sampled"]) == sample["response_tokens"]
        assert len(sample["response"].split("\n")) >= len(turns) // 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pairs_of_conversations_are_compared(tmp_path: Path) -> None:
    algorithm = {"name": "online_dpo"}
    train(config(tmp_path, "pairs", algorithm=algorithm, train={"sequences_per_update": 4}))
    found = rows(tmp_path / "pairs")
    assert all(row["experience/rollout_logprob_diff/max"] < 1e-4 for row in found[1:] if row["preference/pairs/total"])
    assert any(row["preference/pairs/total"] > 0 for row in found[1:])


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_policy_calls_the_tool_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs from nothing to the first step: after imitation, a policy uses the tool."""
    folder = Path(shutil.copytree(EXAMPLE.parent, tmp_path / "examples" / "tools"))
    subprocess.run([sys.executable, str(folder / "stock_data.py")], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    train(folder / EXAMPLE.name, "stages.grpo.train.steps=1", "stages.grpo.eval.at_start=false", timeout_s=640.0)
    run = tmp_path / "runs" / "stock" / "grpo"
    (row,) = [row for row in rows(run) if row["step"] == 1]
    assert row["rollouts/environment_errors/total"] == 0.0
    assert row["rewards/right/mean"] > 0.25  # a random guess is right once in nine times
    turns = [[turn["text"] for turn in one["turns"]] for one in samples(run, 1)]
    result = re.compile(r"<\|user\|>[1-9]<\|eos\|><\|assistant\|>")
    looked_up = [texts for texts in turns if len(texts) > 2 and result.fullmatch(texts[2])]
    assert len(looked_up) > 4
    assert all('<tool_call>{"name": "count", "arguments": {"item": "' in texts[1] for texts in looked_up)
