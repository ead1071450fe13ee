"""Small runs shared by integration tests: the tiny model, a few steps, every important role."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import main

ONLINE: Mapping[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "data": {
        "train": {"task": "running_totals", "split": "train", "size": 64},
        "eval": {"task": "running_totals", "split": "eval", "size": 16},
        "apply_chat_template": False,
        "max_prompt_tokens": 16,
    },
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 8},
    "train": {
        "steps": 4,
        "lr": 1e-3,
        "sequences_per_update": 16,
        "max_tokens_per_microbatch": 256,
        "checkpoint_every": 2,
    },
    "eval": {"every": 2},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0},
}


def write_config(path: Path, changes: Mapping[str, Any], base: Mapping[str, Any] = ONLINE) -> Path:
    """Write a config file: `base` with `changes` merged key by key. None removes a key."""
    path.write_text(yaml.safe_dump(merge(base, changes), sort_keys=False), encoding="utf-8")
    return path


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with the changes merged in."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def rlhf() -> list[str]:
    """Return the command, with the code of these tests even beside another installed checkout."""
    return [sys.executable, "-m", "rlhf.cli"]


def start(config: Path, *arguments: str, without: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `rlhf train` in a separate process group, its output beside the config. `without`: variables to unset."""
    log = config.with_suffix(".log").open("a", encoding="utf-8")
    return subprocess.Popen(
        [*rlhf(), "train", str(config), *arguments],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**{k: v for k, v in os.environ.items() if k not in without}, "OMP_NUM_THREADS": "1"},
    )


def train(config: Path, *arguments: str, timeout_s: float = 280.0) -> None:
    """Run `rlhf train` to the end. A failure shows the output."""
    process = start(config, *arguments)
    code = process.wait(timeout=timeout_s)
    assert code == 0, f"exit {code}\n{config.with_suffix('.log').read_text(encoding='utf-8')[-4000:]}"


def train_here(config: Path, *arguments: str) -> None:
    """Run `rlhf train` to the end, in this process and on the session's Ray. The start takes half the time."""
    assert main(["train", str(config), "--quiet", *arguments]) == 0


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def one_thread(*roles: str) -> dict[str, Any]:
    """Return settings of `cluster.roles` for the same rounding on a Ray with another number of cores."""
    return {role: {"threads": 1} for role in roles}


def without_clocks(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without times, throughput, memory, losses and the nodes' state: the rest repeats bit for bit."""
    clocks = ("time", "throughput/", "memory/", "system/", "recovery/")
    return [{key: value for key, value in row.items() if not key.startswith(clocks)} for row in found]


PPO: dict[str, Any] = {
    "algorithm": {
        "name": "ppo",
        "critic_lr": 1e-3,
        "kl": {"coef": 0.05, "estimator": "k1", "place": "reward", "adaptive": {"target": 0.5, "horizon": 64}},
        "entropy": {"adaptive": {"target": 6.0}},
    },
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "train": {"epochs_per_batch": 2},
}


def weights(run: Path) -> bytes:
    (path,) = (run / "final").glob("*model.safetensors")
    return path.read_bytes()


RUN: dict[str, Any] = merge(
    ONLINE,
    {
        "run": {"name": "tiny"},
        "algorithm": {"name": "sft"},
        "data": {"train": {"split": "sft"}, "eval": {"split": "sft", "seed": 5}, "max_prompt_tokens": None},
        "rollouts": None,
        "train": {"max_tokens_per_microbatch": 512},
    },
)
