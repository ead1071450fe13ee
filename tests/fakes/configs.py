"""The smallest configurations of runs, in one process and without files."""

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


OFFLINE: dict[str, Any] = {
    "run": {"name": "demo"},
    "policy": {"model": "m"},
    "algorithm": {"name": "sft"},
    "data": {"train": "a.jsonl"},
    "train": {"steps": 3, "lr": 1.0, "sequences_per_update": 2},
}


def online_config(**sections: Any) -> Config:
    """Return the configuration with these sections. A mapping adds its keys to the section, but rewards replace all."""
    return _with(ONLINE, sections)


def offline_config(**sections: Any) -> Config:
    """Return the configuration of a run on fixed data, with these sections."""
    return _with(OFFLINE, sections)


def _with(base: Mapping[str, Any], sections: Mapping[str, Any]) -> Config:
    merged = dict(base)
    for name, value in sections.items():
        adds = isinstance(value, Mapping) and name not in ("rewards", "algorithm")
        merged[name] = {**merged.get(name, {}), **value} if adds else value
    return Config.model_validate(merged)
