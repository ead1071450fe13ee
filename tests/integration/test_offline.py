"""Real runs go from fixed data to rollouts: imitation, a reward model, and PPO on that model, as stages of one run.

A pipeline killed in the second stage and resumed equals the unbroken pipeline. transformers can load the trained reward
model too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.models.packed.heads import sequence_scores
from rlhf.models.reward_models import load_reward_model
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
    assert rows(unbroken / "dpo")[0]["eval/heldout/margin"] == 0.0  # the policy is its own reference still
    assert rows(unbroken / "dpo")[-1]["eval/heldout/margin"] > 0.0
    assert rows(unbroken / "reward")[-1]["preference/accuracy/mean"] > 0.7
    assert rows(unbroken / "ppo")[-1]["rewards/preference/mean"] == rows(unbroken / "ppo")[-1]["rewards/score/mean"]
    cached = list((unbroken.parent / "reference_logprobs").iterdir())
    assert len(cached) == 2  # training and evaluation set


@pytest.mark.timeout(600)
def test_the_reward_model_is_one_for_transformers(unbroken: Path) -> None:
    folder = unbroken / "reward" / "final"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["8+3+8+4=11,19,23", "2+1=3"]
    ids = [torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in texts]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.no_grad():
        scores = theirs(batch, attention_mask=(batch != tokenizer.pad_token_id).long()).logits[:, 0]
        ours = sequence_scores(
            load_reward_model(str(folder), dtype=torch.float32), torch.cat(ids), torch.tensor([len(i) for i in ids])
        )
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-5)


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
