"""A tiny vision model learns to read images: imitation, then GRPO. With exchanged images the model can only guess.

The settings are those of configs/vision_quickstart.yaml. Workers, objectives and loop of GRPO are those of a run.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import load
from rlhf.config.schema.data import PromptFormat
from rlhf.data.examples import Example, Reading, load_examples
from rlhf.data.prompts import load_prompts
from rlhf.data.sources import read_rows
from rlhf.data.tasks import TaskSource
from rlhf.models.files.export import export_model
from rlhf.models.files.loading import load_causal_lm, load_tokenizer
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.images import open_images
from rlhf.preflight.sources import row_images
from rlhf.tracking.sinks.tracker import read_metrics
from rlhf.types import Prompt
from rlhf.vision.keys import image_keys
from rlhf.vision.kinds import is_vision_weight
from rlhf.vision.store import ImageStore
from tests.curves.in_process import run, seen_logits

RECIPE = read_tree(Path(__file__).parents[2] / "configs" / "vision_quickstart.yaml").values
SFT, GRPO = RECIPE["stages"]["sft"], RECIPE["stages"]["grpo"]
READING = Reading(system_prompt=None, apply_chat_template=True, max_tokens=128)
CHANCE = 0.25


def rows_of(data: dict[str, Any], images: Any) -> list[Any]:
    return read_rows(TaskSource(**data), images=images)


def imitate(folder: Path, examples: Sequence[Example], images: Path) -> None:
    """Train the model of a folder as the recipe's first stage does, by plain torch."""
    settings, model = SFT["train"], load_causal_lm(str(folder), dtype=torch.float32)
    open_images(model, images)
    seen = [weight for name, weight in model.named_parameters() if is_vision_weight(name)]
    own = [weight for name, weight in model.named_parameters() if not is_vision_weight(name)]
    rates = [settings["lr"], SFT["policy"]["vision_lr"]]
    groups = [{"params": weights, "rate": rate} for weights, rate in zip((own, seen), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=settings["betas"], weight_decay=settings["weight_decay"])
    draw, steps = random.Random(0), settings["steps"]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min((step + 1) / settings["warmup_steps"], (steps - step) / steps)
        batch = draw.sample(examples, settings["sequences_per_update"])
        ids = torch.tensor([token for example in batch for token in example.token_ids])
        mask = torch.tensor([learnt for example in batch for learnt in example.loss_mask])
        lengths = torch.tensor([example.longest for example in batch])
        (-policy_logprobs_only(model, ids, lengths, mask=mask)[mask].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    export_model(folder, model.state_dict().items(), model, load_tokenizer(str(folder)), dtype=torch.float32)


def accuracy(model: Any, prompts: Sequence[Prompt], tokenizer: Any) -> float:
    """Return how often the likeliest first token begins the answer. The answers to a question begin differently."""
    with torch.no_grad():
        told = seen_logits(model, [list(prompt.token_ids) for prompt in prompts]).argmax(-1).tolist()
    begun = [tokenizer(str(prompt.columns["answer"]), add_special_tokens=False)["input_ids"][0] for prompt in prompts]
    return sum(a == b for a, b in zip(told, begun, strict=True)) / len(prompts)


def with_images_of(prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Prompt]:
    """Return the prompts with other images of the same size."""
    return [
        replace(prompt, token_ids=tuple(-key if token < 0 else token for token in prompt.token_ids))
        for prompt, key in zip(prompts, keys, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("alone")
def test_a_tiny_model_learns_from_images_alone(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, store = build_tiny_vision(tmp_path / "model", "qwen3_vl", seed=0), ImageStore(tmp_path / "images")
    images = row_images(str(model), store.folder, PromptFormat())
    reading, tokenizer = replace(READING, images=images), load_tokenizer(str(model))
    imitate(model, load_examples(rows_of(SFT["data"]["train"], images), tokenizer, reading).items, store.folder)

    tree = {name: GRPO[name] for name in ("algorithm", "data", "rollouts", "rewards", "train", "eval")}
    tree["data"] = {**RECIPE["data"], **GRPO["data"]}
    tree["policy"] = {**RECIPE["policy"], **GRPO["policy"], "model": str(model)}
    tree["run"] = {"name": "grpo", "dir": str(tmp_path), "seed": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    folder = asyncio.run(run(load(tmp_path / "run.yaml")))
    scores = [row["eval/shapes/score"] for row in read_metrics(folder) if "eval/shapes/score" in row]
    assert scores[-1] > scores[0] + 0.2

    trained = load_causal_lm(str(folder / "final"), dtype=torch.float32)
    open_images(trained, store.folder)
    prompts = load_prompts(rows_of(GRPO["data"]["eval"]["shapes"], images), tokenizer, reading).items
    assert accuracy(trained, prompts, tokenizer) > scores[-1] - 0.05
    keys = [image_keys(prompt.token_ids)[0] for prompt in prompts]
    exchanged = with_images_of(prompts, keys[1:] + keys[:1])
    assert accuracy(trained, exchanged, tokenizer) < CHANCE + 0.1
    grey = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 200, 200)).save(grey, "PNG")
    blank = with_images_of(prompts, [store.add(grey.getvalue())] * len(prompts))
    assert accuracy(trained, blank, tokenizer) < CHANCE + 0.1
