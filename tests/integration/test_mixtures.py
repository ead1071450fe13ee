"""A mixture of experts through the stages of RLHF: imitation, a reward model, preferences, PPO and GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.models.files.loading import load_causal_lm
from rlhf.tracking.sinks.tracker import read_metrics
from tests.integration.recipes import train, write_config
from tests.tiny_learners import build_tiny_mixture

TASK = {"task": "running_totals", "split": "train", "size": 64}
PAIRS = {"algorithm": {"name": "dpo"}, "data": {"train": TASK | {"split": "pairs"}}}
SAMPLED: dict[str, Any] = {
    "data": {"train": TASK, "max_prompt_tokens": 16},
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 8},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": ".*[0-9].*"}}},
}
BASE: dict[str, Any] = {
    "data": {"apply_chat_template": False},
    "train": {"steps": 2, "lr": 1e-3, "sequences_per_update": 16, "max_tokens_per_microbatch": 512},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0},
}
STAGES: dict[str, Any] = {
    "sft": {"algorithm": {"name": "sft"}, "data": {"train": TASK | {"split": "sft"}}},
    "reward": {
        "policy": {"model": "stage:sft"},
        "algorithm": {"name": "reward_model"},
        "data": {"train": TASK | {"split": "pairs"}},
    },
    "dpo": {"policy": {"model": "stage:sft"}, **PAIRS},
    "ppo": {
        "policy": {"model": "stage:dpo"},
        "reward": {"model": "stage:reward", "dtype": "float32"},
        "algorithm": {"name": "ppo", "kl": {"coef": 0.05}},
        **SAMPLED,
        "rewards": {"preference": {"role": "reward", "truncated_score": -8.0}},
    },
    "grpo": {"policy": {"model": "stage:dpo", "router_balance_coef": 1e-3}, "algorithm": {"name": "grpo"}, **SAMPLED},
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_mixture_passes_all_stages(tmp_path: Path) -> None:
    policy = {"model": str(build_tiny_mixture(tmp_path / "model")), "dtype": "float32"}
    own = {"run": {"name": "run", "dir": str(tmp_path), "seed": 0}, "policy": policy, "stages": STAGES}
    train(write_config(tmp_path / "run.yaml", own, BASE), timeout_s=380.0)
    before = tmp_path / "model"
    for stage in STAGES:
        folder = tmp_path / "run" / stage
        row = list(read_metrics(folder))[-1]
        loads = {key: value for key, value in row.items() if key.endswith("router_entropy")}
        assert loads, f"{stage} measures no routers"
        assert all(0.0 < value <= 1.0 for value in loads.values()), loads
        ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "final", before))
        assert ours.keys() - theirs.keys() <= {"score.weight"}
        changed = {name for name, weight in theirs.items() if name in ours and not torch.equal(ours[name], weight)}
        assert {name for name in changed if ".experts." in name}, f"{stage} trains no experts"
        assert {name for name in changed if ".gate." in name}, f"{stage} trains no routers"
        if stage in ("sft", "dpo"):
            before = folder / "final"
    for stage in ("ppo", "grpo"):
        row = list(read_metrics(tmp_path / "run" / stage))[-1]
        assert row["experience/rollout_logprob_diff/max"] < 1e-3
        assert row["weight_sync/probe_max_diff"] < 1e-3
    assert any("critic" in key and "router" in key for key in list(read_metrics(tmp_path / "run" / "ppo"))[-1])
    load_causal_lm(str(tmp_path / "run" / "grpo" / "final"), dtype=torch.float32)
