"""Configurations of tiny runs in a folder, and why their inputs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.preflight.inputs import load_inputs

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f" {n + n}", "rejected": " 0"} for n in range(1, 9)]


def loaded(folder: Path, **sections: Any) -> Any:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    tree = {
        "run": {"name": "demo", "dir": str(folder)},
        "algorithm": {"name": "dpo"},
        "data": {"train": str(data)},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree | sections))
    return load(path)


def ppo(folder: Path, model: Path, **sections: Any) -> Any:
    return loaded(
        folder,
        **{
            "policy": {"model": str(model), "dtype": "float32"},
            "algorithm": {"name": "ppo"},
            "data": {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64},
            "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
            "rewards": {"correct": {"function": "exact_match"}},
        }
        | sections,
    )


def refusal(run: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_inputs(run)
    return str(caught.value)
