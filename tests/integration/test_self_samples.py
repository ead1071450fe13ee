"""Simple self-distillation: a tiny model learns from its own samples through the commands of docs/algorithms.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import rlhf
from examples.self_samples import WARM, write_self_samples
from rlhf.data.sources import read_rows
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.evaluation.decoding import Decoding
from rlhf.rewards.functions.matching import last_number
from tests.curves.imitation import after_imitation
from tests.integration.recipes import train_here, write_config

pytestmark = pytest.mark.slow
RAW = {"apply_chat_template": False, "max_new_tokens": 13}
GAIN = 0.05


def score(model: Path) -> float:
    """Return the share of right answers at temperature 1."""
    rows = make_rows(TaskSource(task="running_totals", split="eval", size=512))
    sampled = rlhf.generate(model, [row["prompt"] for row in rows], decoding=Decoding(temperature=1.0, **RAW))
    right = [last_number(one.prompt, one.response, answer=rows[one.prompt_id]["answer"]) for one in sampled]
    return sum(right) / len(right)


@pytest.mark.timeout(900)
def test_a_model_samples_better_after_learning_its_own_truncated_samples(tmp_path: Path, ray_local: None) -> None:
    rows = make_rows(TaskSource(task="running_totals", split="sft", size=2500))
    model = after_imitation(tmp_path / "model", [(row["prompt"], row["completion"]) for row in rows], steps=400)
    prompts = [row["prompt"] for row in make_rows(TaskSource(task="running_totals", split="train", size=3000))]
    samples = tmp_path / "self_samples.jsonl"
    count = write_self_samples(model, prompts, samples, replace(WARM, top_p=0.5, **RAW))
    found = read_rows(str(samples))
    assert len(found) == count > 2900
    assert {row.columns["prompt"] for row in found} <= set(prompts)
    changes = {
        "base": "recipe:ssd_smollm2",
        "run": {"name": "ssd", "dir": str(tmp_path)},
        "policy": {"model": str(model), "dtype": "float32"},
        "data": {"train": str(samples), "apply_chat_template": False, "max_sequence_tokens": 64},
        "train": {"steps": 300, "sequences_per_update": 32, "lr": 1e-3, "checkpoint_every": 300, "betas": [0.9, 0.95]},
    }
    train_here(write_config(tmp_path / "ssd.yaml", changes, base={}))
    before, after = score(model), score(tmp_path / "ssd" / "final")
    assert after > before + GAIN, (before, after)
