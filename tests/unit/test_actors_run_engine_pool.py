"""Runs with equal settings reuse engines, and starts are ordered. integration/test_online.py keeps real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.run.engine_pool import EngineLease, engines_key
from rlhf.config.files.load import load
from rlhf.config.schema.cluster import ClusterConfig, Roles, RolloutResources
from rlhf.config.schema.root import Config
from tests.integration.recipes import write_config


@pytest.fixture
def run(tmp_path: Path) -> Any:
    rewards = {"rewards": {"correct": {"function": "last_number"}}}
    path = write_config(tmp_path / "run.yaml", {"run": {"name": "demo"}, "algorithm": {"name": "grpo"}, **rewards})
    return lambda *overrides: cast(Config, load(path, overrides).stages["demo"])


DIFFERENT = ("policy.lora={rank: 4}", "policy.dtype=bfloat16", "policy.model=x", "cluster.roles.rollout.engines=2")
SAME = ("train.lr=0.5", "run.seed=7", "rollouts.temperature=0.5", "algorithm.clip_low=0.1")


@pytest.mark.parametrize("overrides", [*SAME, *DIFFERENT])
def test_engines_follow_from_their_settings_and_not_from_how_is_trained(run: Any, overrides: str) -> None:
    assert (engines_key(run(overrides), 32, None) == engines_key(run(), 32, None)) == (overrides in SAME)


def test_engines_that_keep_other_things_or_longer_responses_are_others(run: Any) -> None:
    config, game = run(), cast(Any, SimpleNamespace(max_turns=2))
    others = [
        config.model_copy(update={section: getattr(config, section).model_copy(update={key: True})})
        for section, key in (("rollouts", "carry_over"), ("policy", "router_replay"))
    ]
    keys = [engines_key(config, length, world) for length, world in ((32, None), (64, None), (32, game))]
    assert len({*keys, *(engines_key(other, 32, None) for other in others)}) == 5


class Group:
    """A group that records the beginning and the end of starts in the calls of all groups."""

    def __init__(self, role: str, calls: list[str]) -> None:
        self.role, self.calls = role, calls

    async def start(self, *, deadline_s: float) -> None:
        self.calls.append(f"{self.role} begins")
        await asyncio.sleep(0)
        self.calls.append(f"{self.role} ends")

    async def sleep(self, *, keep_weights: bool) -> None:
        self.calls.append(f"{self.role} sleeps")


TOGETHER = ["policy begins", "rollout begins", "policy ends", "rollout ends"]
ENGINES_FIRST = ["rollout begins", "rollout ends", "policy begins", "policy ends"]


@pytest.mark.parametrize(
    ("device", "colocated", "shares_gpus", "is_started", "expected"),
    [
        ("cpu", False, False, False, TOGETHER),
        ("cpu", True, False, False, TOGETHER),
        ("cpu", False, False, True, ["policy begins", "policy ends"]),
        ("cuda", False, False, False, TOGETHER),
        ("cuda", False, True, False, ENGINES_FIRST),
        ("cuda", True, True, False, [*ENGINES_FIRST[:2], "rollout sleeps", *ENGINES_FIRST[2:]]),
    ],
)
def test_no_process_starts_while_an_engine_measures_its_gpu(
    device: Any, colocated: bool, shares_gpus: bool, is_started: bool, expected: list[str]
) -> None:
    calls: list[str] = []
    roles = Roles(rollout=RolloutResources(colocate_with="policy" if colocated else None))
    cluster = ClusterConfig(device=device, roles=roles)
    placement: Any = SimpleNamespace(plan=SimpleNamespace(shares_gpus=lambda role: shares_gpus))
    engines: Any = Group("rollout", calls)
    lease = EngineLease(key="", placement=placement, engines=engines, may_stay=False, is_started=is_started)
    policy: Any = Group("policy", calls)
    asyncio.run(lease.start_with([policy], cluster))
    assert calls == expected
