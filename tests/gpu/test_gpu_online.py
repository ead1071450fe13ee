"""Whole runs on GPUs from the command line: the tiny model, two steps, every role on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.gpu_helpers import THREE_GPUS, TWO_GPUS
from tests.integration.recipes import ONLINE, merge, rows, train, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

KL_IN_LOSS = {"coef": 0.01, "estimator": "k3", "place": "loss"}
KL_IN_REWARD = {"coef": 0.01, "estimator": "k1", "place": "reward"}
BESIDE = {"colocate_with": "policy", "gpu_memory_utilization": 0.3}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"algorithm": {"name": "grpo", "kl": KL_IN_LOSS}},
    "grpo_zero_3": {
        "algorithm": {"name": "grpo", "kl": KL_IN_LOSS},
        "cluster": {"roles": {"policy": {"zero_stage": 3}}},
    },
    "ppo": {"algorithm": {"name": "ppo", "kl": KL_IN_REWARD}},
    "lora": {"algorithm": {"name": "grpo", "kl": KL_IN_LOSS}, "policy": {"lora": {"rank": 8}}},
}


def config(path: Path, changes: Mapping[str, Any], rollout: Mapping[str, Any]) -> Path:
    base = {
        "run": {"name": "gpu", "dir": str(path.parent), "seed": 1},
        "policy": {"dtype": "bfloat16"},
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {"steps": 2},
        "cluster": {"device": "cuda", "start_timeout_s": 400.0, "roles": {"rollout": dict(rollout)}},
    }
    return write_config(path, changes, merge(ONLINE, base))


def check(run: Path, name: str) -> None:
    found = rows(run)
    assert [row["step"] for row in found] == [0, 1, 2]
    assert [row["weight_sync/version"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["weight_sync/probe_max_diff"] < 1.0
    for row in found[1:]:
        assert math.isfinite(row["update/grad_norm"])
        assert row["experience/rollout_logprob_diff/mean"] < 0.1
        for role in ("policy", "rollout", *(["critic"] if name == "ppo" else [])):
            assert row[f"memory/{role}_gpu_gib"] > 0.0
    assert (run / "checkpoints" / "latest").resolve().name == "step_000002"
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (run / "final" / weights).exists()


@pytest.mark.parametrize("name", RUNS)
def test_roles_take_turns_on_one_gpu(name: str, tmp_path: Path) -> None:
    train(config(tmp_path / "run.yaml", RUNS[name], BESIDE), timeout_s=800.0)
    check(tmp_path / "gpu", name)


def test_such_a_run_can_be_resumed(tmp_path: Path) -> None:
    train(config(tmp_path / "run.yaml", RUNS["grpo"], BESIDE), timeout_s=400.0)
    config(tmp_path / "run.yaml", {**RUNS["grpo"], "train": {"steps": 3}}, BESIDE)
    (tmp_path / "gpu" / "final").rename(tmp_path / "final_of_two_steps")
    train(tmp_path / "run.yaml", "--resume", "auto", timeout_s=400.0)
    assert [row["step"] for row in rows(tmp_path / "gpu")] == [0, 1, 2, 3]


@TWO_GPUS
@pytest.mark.parametrize("name", ["grpo", "lora"])
def test_policy_and_engine_on_gpus_of_their_own(name: str, tmp_path: Path) -> None:
    train(config(tmp_path / "run.yaml", RUNS[name], {"gpu_memory_utilization": 0.3}), timeout_s=800.0)
    check(tmp_path / "gpu", name)


@TWO_GPUS
def test_two_ranks_with_an_engine_beside_one_of_them(tmp_path: Path) -> None:
    changes = {**RUNS["grpo"], "cluster": {"roles": {"policy": {"workers": 2}}}}
    train(config(tmp_path / "run.yaml", changes, BESIDE), timeout_s=800.0)
    check(tmp_path / "gpu", "grpo")


@THREE_GPUS
def test_an_engine_of_two_gpus(tmp_path: Path) -> None:
    rollout = {"gpu_memory_utilization": 0.3, "tensor_parallel": 2}
    train(config(tmp_path / "run.yaml", RUNS["grpo"], rollout), timeout_s=800.0)
    check(tmp_path / "gpu", "grpo")
