"""A run of DPO, of a reward model and of PPO after them."""

from __future__ import annotations

from typing import Any

from tests.integration.recipes import one_thread

TRAIN = {"sequences_per_update": 16, "max_tokens_per_microbatch": 512, "lr": 1e-3, "checkpoint_every": 3}
PIPELINE: dict[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "data": {"apply_chat_template": False},
    "cluster": {
        "object_store_gib": 0.25,
        "start_timeout_s": 200.0,
        "call_timeout_s": 120.0,
        "roles": one_thread("policy"),
    },
    "stages": {
        "dpo": {
            "algorithm": {"name": "dpo", "loss": {"sigmoid": 1.0, "aot": 0.5}},
            "data": {
                "train": {"task": "running_totals", "split": "pairs", "size": 64},
                "eval": {"task": "running_totals", "split": "pairs", "size": 16, "seed": 5},
            },
            "train": {**TRAIN, "steps": 4},
            "eval": {"every": 2},
        },
        "reward": {
            "policy": {"model": "stage:dpo"},
            "algorithm": {"name": "reward_model", "centering": 0.01},
            "data": {"train": {"task": "running_totals", "split": "pairs", "size": 64}},
            "train": {**TRAIN, "steps": 40, "checkpoint_every": 5},
        },
        "ppo": {
            "policy": {"model": "stage:dpo"},
            "reward": {"model": "stage:reward", "dtype": "float32"},
            "algorithm": {"name": "ppo", "critic_lr": 1e-3},
            "data": {"train": {"task": "running_totals", "split": "train", "size": 64}, "max_prompt_tokens": 16},
            "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8},
            "rewards": {"preference": {"role": "reward", "truncated_score": -1.0}},
            "train": {**TRAIN, "steps": 1},
        },
    },
}
