"""The content of each GPU in a colocated run, call by call, agrees with the content in `rlhf plan`.

The run's own controller drives workers of the tiny model in one process, and every call of a role is recorded. The
calls are then replayed for a model of seven billion weights: each role holds the planner's bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.config.mistakes.explain import parse
from rlhf.config.nodes import Node
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.root import Config
from rlhf.config.validation.run import problems
from rlhf.controller.learning import OnlineRoles
from rlhf.planning.fitting import Fit, places
from rlhf.planning.footprints import Sizes, footprints
from rlhf.planning.memory import GIB, Footprint
from tests.curves.in_process import run
from tests.integration.rank_gang import Gang, Gangs
from tests.integration.recipes import ONLINE, merge, write_config

LARGE = "Qwen/Qwen2.5-7B-Instruct"
GPU_GIB = 80.0
PASSES = {
    "prepare",
    "set_advantages",
    "forward_backward",
    "optim_step",
    "values",
    "logprobs",
    "states",
    "mean_logprobs",
}
Calls = Sequence[tuple[str, str]]  # role and method

REWARDS: dict[str, Any] = {"correct": {"function": "last_number"}}
SHARED: dict[str, Any] = {
    "cluster": {"device": "cuda", "roles": {"rollout": {"colocate_with": "policy"}}},
    "train": {"steps": 2, "checkpoint_every": 1},
    "eval": {"every": 1},
}
TEACHER = {"teacher": {"model": "tiny:llama", "dtype": "float32"}}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"name": "grpo", "kl": {"coef": 0.01}}, "rewards": REWARDS},
    "ppo": {"algorithm": {"name": "ppo", "kl": {"coef": 0.01}}, "rewards": REWARDS},
    "online_dpo": {"algorithm": {"name": "online_dpo"}, "rewards": REWARDS, "train": {"sequences_per_update": 8}},
    "on_policy_distillation": {"algorithm": {"name": "on_policy_distillation"}, **TEACHER},
}


class Recorder:
    """Records all calls of a role."""

    def __init__(self, name: str, role: Any, calls: list[tuple[str, str]]) -> None:
        self.name, self.recorded, self.calls = name, role, calls

    def __getattr__(self, method: str) -> Any:
        member = getattr(self.recorded, method)
        if not callable(member):
            return member

        def call(*args: Any, **options: Any) -> Any:
            part = options.get("part") or next((one for one in args if one in ("weights", "cache")), "")
            self.calls.append((self.name, f"{method} {part}".strip()))
            return member(*args, **options)

        return call


def record_calls(rank: int, world_size: int, *, config: Path) -> Calls:
    """Train as the configuration says, and return all calls of roles in order."""
    calls: list[tuple[str, str]] = []

    def watch(roles: OnlineRoles) -> OnlineRoles:
        members = {name: getattr(roles, name) for name in OnlineRoles.__slots__}
        return replace(roles, **{n: Recorder(n, one, calls) for n, one in members.items() if one is not None})

    asyncio.run(run(load(config), watch=watch))
    return calls


class Ledger:
    """The bytes of each role on a shared GPU. A role must be on the GPU during calls that need the GPU."""

    def __init__(self, by_role: dict[str, Footprint], calls: Calls) -> None:
        self.by_role = by_role
        self.on = {name: name != "rollout" for name in by_role}  # engines sleep when the controller begins
        self.cached = dict.fromkeys(by_role, False)  # whether torch still caches the memory of a pass
        self.published = False
        self.awake: set[str] = set()
        self.most, self.fullest = 0.0, ""
        for role, method in calls:
            if role in by_role:
                self._take(role, method)
                total = sum(map(self._bytes, by_role))
                if total > self.most:
                    self.most, self.fullest = total, f"{role}.{method}"

    def _take(self, role: str, method: str) -> None:
        if role == "rollout":
            self._engine(method)
        elif method in ("offload", "reload"):
            self.on[role], self.cached[role] = method == "reload", False
        elif method == "empty_cache":
            self.cached[role] = False
        elif method in ("publish", "settle"):
            assert self.on[role], f"{role}.{method} while it is put aside"
            self.published = method == "publish"
        elif method not in ("memory", "arithmetic", "token_signals", "num_ranks", "write_samples", "answers"):
            assert self.on[role], f"{role}.{method} while it is put aside"
            self.cached[role] |= method in PASSES

    def _engine(self, method: str) -> None:
        if method == "sleep":
            self.awake.clear()
        elif method.startswith("wake"):
            self.awake.add(method.split()[1])
        elif method == "update_weights":
            assert self.awake == {"weights"}
        elif method in ("generate", "probe"):
            assert self.awake == {"weights", "cache"}

    def _bytes(self, role: str) -> float:
        one = self.by_role[role]
        if role == "rollout":
            if "cache" in self.awake:
                return one.of("device")
            return one.held("always") if self.awake else one.stays
        if not self.on[role]:
            return one.stays
        transfer = one.held("sync") if role == "policy" and self.published else 0.0
        return one.held("always") + (one.held("step") if self.cached[role] or role == "reward" else 0.0) + transfer


def on_shared_gpu(config: Config) -> tuple[Fit, dict[str, Footprint]]:
    """Return the plan of the GPU shared by an engine, and the footprints of the roles there."""
    sizes = Sizes(gpu_memory_gib=GPU_GIB)
    found = footprints(config, sizes)
    nodes = [Node(cpus=64.0, gpus=8.0, mem_gib=2000.0, gpumem_gib=GPU_GIB)]
    shared = [one for one in places(config, plan_placement(config), found, nodes) if "policy, rollout" in one.where]
    fit = max(shared, key=lambda one: one.where.count(","))  # the GPU with the most roles
    roles = fit.where.removeprefix("GPU of ").split(", ")
    return fit, {one.role: one for one in found if one.role in roles}


def variants(name: str) -> list[Config]:
    """Return the run with large models, in every accepted layout of policy and critic."""
    found = []
    loras: tuple[dict[str, int] | None, ...] = (None, {"rank": 16})
    layouts = product((2, 3), ([], ["optimizer"]), loras, (False, True), (0.3, 0.85))
    for stage, offload, lora, checkpointing, share in layouts:
        trained = {"workers": 4, "zero_stage": stage, "offload": offload}
        roles = {"policy": trained, "rollout": {"engines": 4, "gpu_memory_utilization": share}}
        changes: dict[str, Any] = {
            "policy": {"model": LARGE, "dtype": "bfloat16", "lora": lora, "gradient_checkpointing": checkpointing},
            "cluster": {"roles": roles | ({"critic": trained} if name == "ppo" else {})},
            **({"teacher": {"model": LARGE, "dtype": "bfloat16"}} if "teacher" in RUNS[name] else {}),
        }
        config = parse(merge(merge(merge(ONLINE, SHARED), RUNS[name]), {**changes, "run": {"name": name}}))
        assert isinstance(config, Config), config
        if not problems(config):
            found.append(config)
    return found


@pytest.fixture
def gang(gangs: Gangs) -> Gang:
    return gangs[1]


@pytest.mark.parametrize("name", RUNS)
def test_a_shared_gpu_never_holds_more_than_the_plan_says(gang: Gang, name: str, tmp_path: Path) -> None:
    changes = merge(SHARED, {**RUNS[name], "run": {"name": name, "dir": str(tmp_path)}})
    config = write_config(tmp_path / "run.yaml", changes)
    (calls,) = gang.run(record_calls, config=config)
    fullest = set()
    for layout in variants(name):
        fit, by_role = on_shared_gpu(layout)
        ledger = Ledger(by_role, calls)
        shown = f"{layout.policy.lora}, {layout.cluster.roles.policy}: {ledger.fullest}, {fit.parts}"
        assert ledger.most == pytest.approx(fit.wanted), shown
        assert fit.fits is (ledger.most <= GPU_GIB * GIB)
        fullest.add(fit.parts.partition(":")[0])
    assert fullest >= {"generate", "weight sync"}
