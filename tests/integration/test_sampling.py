"""Batches are made of some of the requested prompts, by real engines and rewards.

After a kill in training on such a batch, the resumed run makes the same batch, even if chance chose the prompts: the
logged row is the same bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faults import kill_all, wait_for
from tests.integration.recipes import rows, start, train, without_clocks, write_config

GRPO: dict[str, Any] = {
    "algorithm": {"name": "grpo"},
    "data": {"train": {"task": "running_totals", "split": "train", "size": 24}, "eval": None},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "eval": None,
}
WAYS: dict[str, dict[str, Any]] = {
    "refilled": {"rollouts": {"dynamic_sampling": {}}, "data": {"curriculum": {"outside": 0.5}}},
    "first": {"rollouts": {"dynamic_sampling": {"max_mean": 0.8}, "oversample": 1.5, "max_new_tokens": 24}},
    "continued": {
        "algorithm": {"name": "grpo", "correction": {"preset": "token_tis"}},
        "rollouts": {"oversample": 1.5, "carry_over": True, "max_new_tokens": 96},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", [{"name": "grpo", "kl": {"coef": 0.1}}, {"name": "online_dpo"}], ids=str)
def test_logprobs_are_taken_at_each_prompts_own_temperature(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """Sampler and trainer, and trainer and reference, agree although two prompts in a batch differ in temperature."""
    data = [{"prompt": f"{i}+{i}=", "temperature": (0.3, 1.0, None)[i % 3]} for i in range(10, 34)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    config = write_config(
        tmp_path / "run.yaml",
        {
            **GRPO,
            "run": {"name": "warm", "dir": str(tmp_path)},
            "algorithm": algorithm,
            "data": {**GRPO["data"], "train": str(tmp_path / "prompts.jsonl")},
            "rollouts": {"temperature": 1.7},
            "train": {"steps": 2, "sequences_per_update": 8},
            "tracking": {"samples_per_step": 32},
        },
    )
    train(config)
    first, second = rows(tmp_path / "warm")
    for row in (first, second):
        assert row["experience/rollout_logprob_diff/max"] < 1e-4
    assert first["experience/kl_ref/mean"] < 1e-6 < second["experience/kl_ref/mean"]
    likelihood: dict[float | None, list[float]] = {}
    for sample in samples(tmp_path / "warm", 1):
        likelihood.setdefault(data[sample["prompt_id"]]["temperature"], []).append(sample["mean_rollout_logprob"])  # type: ignore[arg-type]
    cold, *others = (sum(likelihood[at]) / len(likelihood[at]) for at in (0.3, 1.0, None))
    assert cold > max(others) + 0.1  # at 1 the untrained model is almost uniform already


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    """Return the samples of a step's batch."""
    return [json.loads(line) for line in (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WAYS)
def test_a_resumed_run_makes_the_batches_that_it_had_trained_on(tmp_path: Path, name: str) -> None:
    way, folder = WAYS[name], tmp_path / name
    config = write_config(
        tmp_path / f"{name}.yaml",
        {
            **GRPO,
            "run": {"name": name, "dir": str(tmp_path), "seed": 3},
            "algorithm": way.get("algorithm", GRPO["algorithm"]),
            "data": {**GRPO["data"], **way.get("data", {})},
            "rollouts": way["rollouts"],
            "tracking": {"samples_per_step": 32},
        },
    )
    process = start(config)
    wait_for(folder / "metrics.jsonl", 3, timeout_s=240)  # steps 1 to 3: past the checkpoint of step 2
    kill_all(process.pid)
    process.wait(timeout=30)
    assert (folder / "checkpoints" / "latest").resolve().name == "step_000002"
    before, drawn = rows(folder)[:3], samples(folder, 3)
    train(config, "--resume", "auto")

    after = rows(folder)
    assert without_clocks(after[:3]) == without_clocks(before)
    assert samples(folder, 3) == drawn
    assert [row["step"] for row in after] == [1, 2, 3, 4]
    if name != "continued":
        assert sum(row["rollouts/filtered_groups/fraction"] for row in after) > 0.0  # otherwise the test proves nothing
    for row in after:
        step = samples(folder, int(row["step"]))
        by_group: dict[int, set[float]] = {}
        for sample in step:
            by_group.setdefault(sample["group_id"], set()).add(sample["score"])
        assert len(by_group) == 8
        assert name == "continued" or all(len(scores) == 2 for scores in by_group.values())
    if name == "continued":
        assert sum(row["rollouts/carried/fraction"] for row in after) > 0.0
        assert max(row["experience/policy_lag/max"] for row in after) >= 1.0
    elif name == "first":
        assert sum(row["rollouts/cancelled_groups/total"] for row in after) > 0
    else:
        assert after[-1]["data/passed_over/total"] + after[-2]["data/passed_over/total"] > 0
