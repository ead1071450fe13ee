"""A policy learns to play from the environment's reward: the run's own workers and loop, without Ray and vLLM.

The game is that of configs/guessing_game.yaml: a number from 1 to 7 in three guesses. Who halves the range each time
always wins; the demonstrator, who heeds what he is told every other time, does not.
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

from rlhf.config.load import load
from rlhf.config.yaml_tree import read_tree
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.models.tiny import build_tiny_llama
from rlhf.tracking.tracker import read_metrics
from tests.curves.in_process import join_alone, leave_alone, run
from tests.integration.recipes import merge

RECIPE = read_tree(Path(__file__).parents[2] / "configs" / "guessing_game.yaml").values["stages"]["grpo"]
WARM_STEPS, WARM_BATCH, LEARNING_RATE = 200, 32, 2e-3
USER, ASSISTANT, END = 259, 260, 257


def demonstration(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """A game's tokens, and which of them the player says."""
    ids: list[int] = []
    learnt: list[bool] = []
    for message in row["messages"]:
        said = [*message["content"].encode(), END]
        ids += [ASSISTANT if message["role"] == "assistant" else USER, *said]
        learnt += [False, *[message["role"] == "assistant"] * len(said)]
    return ids, learnt


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after imitation."""
    folder = build_tiny_llama(tmp_path_factory.mktemp("warm") / "model", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    rows = make_rows(TaskSource(task="guessing_game", split="sft", size=2000))
    assert tokenizer.apply_chat_template(rows[0]["messages"], return_dict=False) == demonstration(rows[0])[0]
    games = [demonstration(row) for row in rows]
    longest = max(len(ids) for ids, _ in games)
    ids = torch.full((len(games), longest), END)
    labels = torch.full((len(games), longest), -100)
    for index, (tokens, learnt) in enumerate(games):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, : len(tokens)] = torch.where(torch.tensor(learnt), torch.tensor(tokens), -100)
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


async def trained(model: Path, folder: Path, changes: dict[str, Any]) -> tuple[list[dict[str, Any]], Path]:
    """The rows of a run of the recipe, and its folder."""
    own = {"run": {"name": "game", "dir": str(folder), "seed": 0}, "policy": {"model": str(model), "dtype": "float32"}}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(merge(merge(RECIPE, own), changes), sort_keys=False), encoding="utf-8")
    path = await run(load(config, []))
    return list(read_metrics(path)), path


async def test_conversations_pass_through_the_whole_loop(alone: None, tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "model", seed=0)
    small = {
        "data": {"train": {"size": 8}, "eval": {"size": 7}},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4},
        "train": {"steps": 1, "sequences_per_update": 8, "warmup_steps": 0, "checkpoint_every": 1},
    }
    found, folder = await trained(model, tmp_path, small)
    row = found[-1]
    # Sampler and trainer agree about every sampled token, so both have the same tokens at the same places.
    assert row["experience/rollout_logprob_diff/max"] < 1e-4
    assert row["rollouts/turns/max"] == 3.0
    assert row["rollouts/environment_tokens/mean"] > 20.0  # an untrained model is told what a number is, twice
    assert row["rollouts/environment_errors/total"] == 0.0
    lines = (folder / "samples" / "step_000001.jsonl").read_text(encoding="utf-8").splitlines()
    for sample in map(json.loads, lines):
        roles = [turn["role"] for turn in sample["turns"]]
        assert roles == ["prompt", "policy", *["environment", "policy"] * (len(roles) // 2 - 1)]
        assert sum(turn["tokens"] for turn in sample["turns"] if turn["sampled"]) == sample["response_tokens"]


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_game_is_learnt(warm_start: Path, alone: None, tmp_path: Path) -> None:
    changes = {"data": {"eval": {"size": 140}}, "train": {"steps": 12, "checkpoint_every": 12}}
    found, _ = await trained(warm_start, tmp_path, changes)
    before, after = found[0]["eval/heldout/won"], found[-1]["eval/heldout/won"]
    assert after > before + 0.05, json.dumps({"before": before, "after": after})
