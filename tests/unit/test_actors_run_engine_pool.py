"""Which runs may have the engines of the run before. Engines that stay: tests/integration/test_sweep.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.run.engine_pool import engines_key
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from tests.integration.recipes import write_config


@pytest.fixture
def run(tmp_path: Path) -> Any:
    rewards = {"rewards": {"correct": {"function": "last_number"}}}
    path = write_config(tmp_path / "run.yaml", {"run": {"name": "demo"}, "algorithm": {"name": "grpo"}, **rewards})
    return lambda *overrides: cast(Config, load(path, overrides).stages["demo"])


@pytest.mark.parametrize("same", ["train.lr=0.5", "run.seed=7", "rollouts.temperature=0.5", "algorithm.clip_low=0.1"])
def test_engines_do_not_follow_from_how_is_trained(run: Any, same: str) -> None:
    assert engines_key(run(same), 32, None) == engines_key(run(), 32, None)


@pytest.mark.parametrize(
    "other",
    ["policy.lora={rank: 4}", "policy.dtype=bfloat16", "policy.model=x", "cluster.roles.rollout.engines=2"],
)
def test_engines_of_another_kind_are_others(run: Any, other: str) -> None:
    assert engines_key(run(other), 32, None) != engines_key(run(), 32, None)


def test_engines_for_longer_responses_or_conversations_are_others(run: Any) -> None:
    game: Any = SimpleNamespace(max_turns=2)
    assert len({engines_key(run(), length, world) for length, world in ((32, None), (64, None), (32, game))}) == 3
