"""Every algorithm on rollouts raises the score of its tiny task, with the settings of its recipe.

Running totals of four digits, from a model that imitates a careless demonstrator half of the time. The workers,
objectives and the loop are a run's own; Ray and vLLM, which other tests start, are not needed to learn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.algorithms import ONLINE_ALGORITHMS, ONLINE_PAIR_ALGORITHMS
from rlhf.config.load import load
from rlhf.config.yaml_tree import read_tree
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.models.tiny import build_tiny_llama
from rlhf.tracking.tracker import read_metrics
from tests.curves.in_process import join_alone, leave_alone, run
from tests.integration.recipes import merge

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [path for path in sorted(CONFIGS.glob("*_smollm2.yaml"))]
RECIPES = {
    name: path
    for path in SMALL
    if (name := read_tree(path).values.get("algorithm", {}).get("name")) in ONLINE_ALGORITHMS | ONLINE_PAIR_ALGORITHMS
}
QUICK = {"ppo", "grpo", "online_dpo"}  # one of each way to learn
GAIN = 0.08  # of the held-out score
WARM_STEPS, WARM_BATCH, LEARNING_RATE = 780, 32, 2e-3

TASK: dict[str, Any] = {
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 3000},
        "eval": {"task": "running_totals", "split": "eval", "size": 256},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 32, "samples_per_prompt": 8, "max_new_tokens": 13},
    "rewards": {"correct": {"function": "last_number"}},
    "train": {
        "steps": 14,
        "lr": 3e-4,
        "lr_schedule": "linear",
        "warmup_steps": 8,
        "sequences_per_update": 128,
        "max_tokens_per_microbatch": 4096,
        "checkpoint_every": 14,
    },
    "eval": {"every": 14, "temperature": 1.0, "samples_per_prompt": 2},
}
# What a recipe's algorithm needs of the task beyond the above.
CHANGES: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"critic_lr": 1e-3}},
    "dapo": {"algorithm": {"overlong": {"buffer": 2}}},
    "gdpo": {"rewards": {"format": {"function": "format_regex", "args": {"pattern": "[0-9]+,[0-9]+,[0-9]+"}}}},
    "online_dpo": {"train": {"sequences_per_update": 16}},
    "raft": {"train": {"sequences_per_update": 32}},  # of the 64 that it keeps at most
}


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after imitation, which leaves it between the careful and the careless."""
    torch.set_num_threads(1)  # as the workers do: the products are small
    folder = build_tiny_llama(tmp_path_factory.mktemp("warm") / "model", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    rows = make_rows(TaskSource(task="running_totals", split="sft", size=2500))
    end = tokenizer.eos_token_id
    examples = [
        (tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], end]) for row in rows
    ]
    longest = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
    labels = torch.full((len(examples), longest), -100)
    for row, (prompt, response) in enumerate(examples):
        ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    for step in range(WARM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 20, (WARM_STEPS - step) / WARM_STEPS)
        drawn = torch.randint(len(ids), (WARM_BATCH,), generator=order)
        logits = model(ids[drawn]).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), labels[drawn, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process as a gang of one."""
    join_alone()
    yield
    leave_alone()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
async def test_the_score_rises(name: str, warm_start: Path, alone: None, tmp_path: Path) -> None:
    recipe = read_tree(RECIPES[name]).values
    tree = merge(
        {
            "run": {"name": name, "dir": str(tmp_path), "seed": 0},
            "policy": {"model": str(warm_start), "dtype": "float32"},
            "algorithm": recipe["algorithm"],
            **TASK,
        },
        CHANGES.get(name, {}),
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    folder = await run(load(config, []))
    rows = list(read_metrics(folder))
    before, after = rows[0]["eval/heldout/score"], rows[-1]["eval/heldout/score"]
    assert 0.1 < before < 0.6, before
    assert after > before + GAIN, json.dumps({"before": before, "after": after})


def test_every_algorithm_has_a_recipe() -> None:
    assert set(RECIPES) == ONLINE_ALGORITHMS.keys() | ONLINE_PAIR_ALGORITHMS.keys()
