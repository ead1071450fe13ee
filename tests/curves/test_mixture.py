"""A mixture of experts learns the quickstart's task by GRPO, with the recipe of the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from rlhf.config.files.base import read_tree
from rlhf.config.files.load import load
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.imitation import imitate
from tests.curves.in_process import run
from tests.integration.recipes import merge
from tests.tiny_mixture import build_tiny_mixture

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart_grpo.yaml"
WARM_STEPS = 780


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_mixture_learns_by_grpo(alone: None, tmp_path: Path) -> None:
    folder = build_tiny_mixture(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for row in make_rows(TaskSource(task="running_totals", split="sft", size=2500)):
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        learnt = [False] * len(prompt) + [True] * (len(response) + 1)
        examples.append(([*prompt, *response, tokenizer.eos_token_id], learnt))
    imitate(folder, examples, steps=WARM_STEPS)
    stage = read_tree(RECIPE).values["stages"]["grpo"]
    changes = {
        "run": {"name": "mixture", "dir": str(tmp_path), "seed": 0},
        "policy": {"model": str(folder), "dtype": "float32", "router_balance_coef": 1e-3},
        "data": {"apply_chat_template": False, "max_prompt_tokens": 16, "eval": {"size": 256}},
        "eval": {"every": 10},
    }
    tree = merge({key: stage[key] for key in ("algorithm", "data", "rollouts", "rewards", "train")}, changes)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    rows = [row for row in read_metrics(await run(load(config, []))) if "eval/heldout/score" in row]
    before, after = rows[0]["eval/heldout/score"], rows[-1]["eval/heldout/score"]
    assert after >= before + 0.3, json.dumps({"before": before, "after": after})
