"""A resumed run has the values estimated before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.files.load import load
from rlhf.tracking.sinks.tracker import read_metrics
from tests.curves.in_process import run

TREE: dict[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "algorithm": {"name": "a_star_po", "beta": 0.1, "value_samples": 4},
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 24},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_new_tokens": 6},
    "rewards": {"digit": {"function": "format_regex", "args": {"pattern": ".*[0-9].*"}}},
}
NUMBERS = ("update/loss/mean", "advantages/mean", "advantages/prompt_value/mean", "rewards/score/mean")


@pytest.mark.slow
async def test_a_resumed_run_regresses_on_the_same_values(alone: None, tmp_path: Path) -> None:
    async def rows(name: str, steps: int, *, resume: bool = False) -> list[list[float]]:
        train = {"steps": steps, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 128}
        tree = TREE | {
            "run": {"name": name, "dir": str(tmp_path), "seed": 0},
            "train": {**train, "checkpoint_every": 2},
        }
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        folder = await run(load(config, []), resume=resume)
        return [[row[number] for number in NUMBERS] for row in read_metrics(folder)]

    whole = await rows("whole", 4)
    await rows("parts", 2)
    assert await rows("parts", 4, resume=True) == whole
    assert len({row[2] for row in whole}) > 1
