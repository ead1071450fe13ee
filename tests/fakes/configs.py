"""The smallest configuration of an online run, in one process and without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config.schema.root import Config

ONLINE: dict[str, Any] = {
    "run": {"name": "demo"},
    "policy": {"model": "m"},
    "algorithm": {"name": "grpo"},
    "data": {"train": "x.jsonl"},
    "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 2},
    "rewards": {"r": {"function": "f"}},
    "train": {"steps": 10, "lr": 1.0, "sequences_per_update": 8},
}


def online_config(**sections: Any) -> Config:
    """Return the configuration with the given sections.

    A mapping adds keys to a section, but rewards replace all rewards.
    """
    merged = dict(ONLINE)
    for name, value in sections.items():
        adds = isinstance(value, Mapping) and name not in ("rewards", "algorithm")
        merged[name] = {**merged.get(name, {}), **value} if adds else value
    return Config.model_validate(merged)
