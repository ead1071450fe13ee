"""Real runs of the whole loop on the tiny model: Ray, vLLM, DeepSpeed, every role.

The result does not depend on the number of ranks, ZeRO or micro-batches, up to rounding. test_asynchrony.py and
tests/curves/test_losses_of_ranks.py kill and resume runs. Not covered: GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf.tracking.metrics.declarations import expected_metrics
from rlhf.tracking.metrics.histograms import FILE as HISTOGRAMS
from rlhf.tracking.run_folder.atomic import read_lines
from tests.integration.recipes import PPO, one_thread, rows, train, train_here, without_clocks, write_config
from tests.no_pickles import kinds_of


def run_config(folder: Path, name: str) -> Path:
    """The same run under another name."""
    run = {"name": name, "dir": str(folder), "seed": 3}
    threads = {"roles": one_thread("policy", "critic", "reference", "rollout")}
    return write_config(folder / f"{name}.yaml", {**PPO, "run": run, "cluster": threads})


@pytest.fixture(scope="module")
def unbroken(kept_engines: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a PPO run of four steps."""
    folder = tmp_path_factory.mktemp("online")
    train_here(run_config(folder, "unbroken"))
    return folder / "unbroken"


def test_the_run_folder_has_what_it_promises(unbroken: Path) -> None:
    found = rows(unbroken)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    always = expected_metrics(["online", "rewards", "advantages", "reference", "critic", "eval"])
    plain = {name for name in always if "<" not in name}
    assert plain <= set(found[2]), sorted(plain - set(found[2]))
    named = {"rewards/digits/mean", *(f"eval/heldout/{name}" for name in ("score", "digits", "pass@1", "score_low"))}
    named |= {"time/rollouts_s", "time/update_s", "time/checkpoint_s"}
    assert named | {"memory/rollout_rss_gib", "memory/critic_rss_gib"} <= set(found[2])
    assert all(row["rewards/score/std"] > 0.0 for row in found[1:])  # needed by the checks below
    assert [row["weight_sync/version"] for row in found] == [0, 1, 2, 3, 4]
    assert all(row["weight_sync/probe_max_diff"] < 1e-4 for row in found)
    assert all(row["experience/rollout_logprob_diff/max"] < 1e-4 for row in found[1:])
    assert all(row["experience/policy_lag/max"] == 0 for row in found[1:])
    samples = [json.loads(line) for line in (unbroken / "samples" / "step_000002.jsonl").read_text().splitlines()]
    assert {row["split"] for row in samples} == {"train", "heldout"}
    trained = [row for row in samples if row["split"] == "train"]
    assert len(trained) == 16
    assert all(row["response_tokens"] >= 1 and row["advantage"] is not None for row in trained)
    assert {key.split("/")[2] for key in found[2] if key.startswith("system/")} >= {"cpu_fraction", "memory_gib"}
    kinds = kinds_of(unbroken / "checkpoints" / "latest")
    assert kinds["critic/state_00000.safetensors"] == "safetensors"
    assert set(kinds.values()) == {"safetensors", "JSON"}, kinds  # no pickle
    distributions = {row["step"]: row for row in read_lines(unbroken / HISTOGRAMS)}
    assert sorted(distributions) == [1, 2, 3, 4]
    count = {key: sum(one["counts"]) for key, one in distributions[2].items() if key != "step"}
    tokens = round(32 * found[2]["rollouts/response_tokens/mean"])  # 8 prompts, 4 samples of each
    assert count["rollouts/response_tokens/histogram"] == 32
    assert count["advantages/histogram"] == tokens
    assert count["update/ratio/histogram"] == 2 * tokens  # once in each epoch
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "final")
    for row in trained:
        one = row["tokens"]
        assert one["sampled"] == [True] * row["response_tokens"]
        assert "".join(one["texts"]) == tokenizer.decode(one["ids"])
        assert row["response"] == tokenizer.decode(one["ids"], skip_special_tokens=True)
        for name in ("rollout", "old", "ref"):
            assert fmean(one[f"{name}_logprobs"]) == pytest.approx(row[f"mean_{name}_logprob"], abs=1e-4), name
        assert fmean(one["advantages"]) == pytest.approx(row["advantage"], abs=1e-4)
    held_out = next(row["tokens"] for row in samples if row["split"] == "heldout")
    assert held_out["rollout_logprobs"]
    assert (held_out["old_logprobs"], held_out["advantages"]) == (None, None)
    assert json.loads((unbroken / "timeline.json").read_text())
    assert (unbroken / "checkpoints" / "latest").resolve().name == "step_000004"
    for name in ("config.resolved.yaml", "environment.json", "final/model.safetensors", "final/tokenizer.json"):
        assert (unbroken / name).exists(), name
    assert not list(unbroken.glob(".own-*/spool/*"))


LAYOUTS: dict[str, dict[str, Any]] = {
    "two_ranks": {
        "weight_sync": "gloo",
        "roles": {
            "policy": {"workers": 2, "cpus": 0.5, "zero_stage": 3},
            "critic": {"workers": 2, "zero_stage": 1, "sequence_parallel": 2},
            "rollout": {"engines": 2, "cpus": 0.5},
        },
    },
    "one_row": {"roles": {"policy": {"workers": 2, "cpus": 0.5, "sequence_parallel": 2}}},
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_engines_and_microbatches_change_nothing_but_rounding(unbroken: Path, name: str) -> None:
    folder = unbroken.parent
    config = write_config(
        folder / f"{name}.yaml",
        {
            **PPO,
            "run": {"name": name, "dir": str(folder), "seed": 3},
            "train": {**PPO["train"], "steps": 2, "max_tokens_per_microbatch": 64},
            "cluster": LAYOUTS[name],
        },
    )
    train_here(config)
    for one, two in zip(rows(unbroken)[:3], rows(folder / name), strict=True):
        for key, value in without_clocks([one])[0].items():
            if key not in ("update/tokens/total", "update/lr", "update/critic_lr") and value is not None:
                assert two[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (one["step"], key)


DIGITS = {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind", [{}, pytest.param({"init": "pissa", "rslora": True}, marks=pytest.mark.slow)], ids=["lora", "pissa"]
)
def test_a_lora_policy_ships_its_adapter_and_is_its_own_reference(
    ray_local: None, tmp_path: Path, kind: dict[str, Any]
) -> None:
    config = write_config(
        tmp_path / "lora.yaml",
        {
            "run": {"name": "lora", "dir": str(tmp_path)},
            "policy": {"model": "tiny:llama", "dtype": "float32", "lora": {"rank": 4, "alpha": 8.0, **kind}},
            "algorithm": {
                "name": "grpo",
                "kl": {"coef": 0.05, "adaptive": {"target": 0.5, "horizon": 64}},  # in the loss, and one update a batch
                "correction": {"preset": "token_tis", "reject": {"sequence_mean_k3": 0.01}},
            },
            "rewards": DIGITS,
            "train": {"steps": 2, "lr": 1e-2, "sequences_per_update": 32},
        },
    )
    train_here(config)
    found = rows(tmp_path / "lora")
    always = expected_metrics(["online", "rewards", "advantages", "groups", "correction", "eval"])
    assert {name for name in always if "<" not in name} <= set(found[2])
    assert all(row["weight_sync/probe_max_diff"] < 1e-3 for row in found)
    # The adapter begins as the identity; of PiSSA, what is added and taken away again is rounded.
    assert abs(found[1]["experience/kl_ref/mean"]) <= (1e-6 if kind else 0.0)
    assert found[2]["experience/kl_ref/mean"] > 0.0
    assert found[2]["experience/kl_coef"] < 0.05  # no KL in step 1, so the penalty was lowered
    assert all(row["experience/rollout_ess_token"] > 0.999 for row in found[1:])
    assert "memory/reference_rss_gib" not in found[2]
    assert (tmp_path / "lora" / "final" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "lora" / "final" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_bfloat16_a_bypass_clips_what_sampler_and_trainer_disagree_on(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "bypass.yaml",
        {
            "run": {"name": "bypass", "dir": str(tmp_path)},
            "policy": {"model": "tiny:llama", "dtype": "bfloat16"},
            "algorithm": {
                "name": "grpo",
                "clip_low": 1e-3,
                "clip_high": 1e-3,
                "kl": {"coef": 0.01, "place": "reward"},
                "correction": {"mode": "bypass", "reject": {"sequence_max_ratio": [0.998, 1.002]}},
            },
            "rewards": DIGITS,
            "train": {"steps": 2, "sequences_per_update": 32},
        },
    )
    train(config)
    found = rows(tmp_path / "bypass")[1:]
    for row in found:  # one optimizer step a batch: without the bypass every ratio would be 1
        assert 0.0 < row["update/clip_fraction/mean"] < 1.0
        assert 0.0 < row["experience/rollout_rejected/fraction"] < 1.0
        assert row["experience/rollout_ratio/min"] < 1.0 < row["experience/rollout_ratio/max"]
        assert 0.99 < row["experience/rollout_ess_token"] < 1.0
        assert row["experience/rollout_weight/mean"] == pytest.approx(1 - row["experience/rollout_rejected/fraction"])
        assert "experience/kl_ref/mean" in row


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dora_policy_goes_on_from_an_adapter_and_ships_merged_weights(tmp_path: Path) -> None:
    values = {
        "run": {"name": "first", "dir": str(tmp_path)},
        "policy": {"model": "tiny:llama", "dtype": "float32", "lora": {"rank": 4, "alpha": 8.0, "dora": True}},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.05}},
        "rewards": DIGITS,
        "train": {"steps": 1, "lr": 1e-2},
    }
    train(write_config(tmp_path / "first.yaml", values))
    adapter = tmp_path / "first" / "final"
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"]
    policy = {"model": "tiny:llama", "dtype": "float32", "lora": {"lora_plus_ratio": 4.0}, "adapter": str(adapter)}
    second = {**values, "run": {"name": "second", "dir": str(tmp_path)}, "policy": policy}
    train(write_config(tmp_path / "second.yaml", second))
    for name in ("first", "second"):
        found = rows(tmp_path / name)
        assert all(row["weight_sync/probe_max_diff"] < 1e-3 for row in found)
        assert found[1]["experience/kl_ref/mean"] == 0.0  # the reference is the policy at the start of the run
        assert "memory/reference_rss_gib" not in found[1]
    weights = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("first", "second")]
    assert weights[0].keys() == weights[1].keys()
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
