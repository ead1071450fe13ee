"""Real runs with greedy responses beside the sampled ones: one that is killed while it has them is resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.recipes import rows, start, train, without_clocks, write_config
from tests.integration.test_online import kill_all, wait_for

REMAX: dict[str, Any] = {
    "algorithm": {"name": "remax", "kl": {"coef": 0.01, "estimator": "k1", "place": "reward"}},
    "rollouts": {"prompts_per_step": 16, "samples_per_prompt": 1},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "train": {"sequences_per_update": 8},
    "cluster": {"roles": {"rollout": {"engines": 2, "cpus": 0.5}}},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_and_resumed_run_compares_with_the_same_greedy_responses(tmp_path: Path) -> None:
    for name in ("unbroken", "killed"):
        write_config(tmp_path / f"{name}.yaml", {**REMAX, "run": {"name": name, "dir": str(tmp_path), "seed": 3}})
    train(tmp_path / "unbroken.yaml")
    killed = start(tmp_path / "killed.yaml")
    wait_for(tmp_path / "killed" / "metrics.jsonl", 4, timeout_s=240)  # steps 0 to 3: past the checkpoint of step 2
    kill_all(killed.pid)
    killed.wait(timeout=30)
    train(tmp_path / "killed.yaml", "--resume", "auto")

    whole, resumed = (without_clocks(rows(tmp_path / name)) for name in ("unbroken", "killed"))
    assert resumed == whole
    assert all("rewards/greedy/mean" in row for row in whole[1:])
    assert any(row["rewards/greedy/mean"] != row["rewards/score/mean"] for row in whole[1:])
    assert all("advantages/zero_groups/fraction" not in row for row in whole)  # no two responses are compared
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
