"""Real runs of online DPO on the tiny model: the best and the worst of four responses, the reference renewed.

test_online_pairs.py has the laws of the worker, and tests/unit/test_controller_pair_learning.py a resumed reference.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.tracking.metrics.declarations import expected_metrics
from tests.integration.recipes import rows, train, write_config

PAIRS: dict[str, Any] = {
    "algorithm": {"name": "online_dpo", "beta": 0.5, "reference_every": 2},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "train": {"steps": 6, "sequences_per_update": 4, "epochs_per_batch": 2, "checkpoint_every": 3},
    "eval": {"every": 3},  # step 4 has no best checkpoint: what is killed after it goes on from step 3
}


def run_config(folder: Path, name: str, **changes: Any) -> Path:
    """The same run under another name."""
    return write_config(
        folder / f"{name}.yaml", {**PAIRS, **changes, "run": {"name": name, "dir": str(folder), "seed": 3}}
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("pairs")
    train(run_config(folder, "unbroken"))
    return folder / "unbroken"


@pytest.mark.slow
def test_its_rows_have_what_they_promise(unbroken: Path) -> None:
    found = rows(unbroken)
    assert [row["step"] for row in found] == list(range(7))
    always = {
        name
        for name in expected_metrics(["online", "rewards", "preference", "groups", "reference", "eval"])
        if "<" not in name
    }
    assert always <= set(found[3]), sorted(always - set(found[3]))
    for row in found[1:]:
        assert 0 < row["preference/pairs/total"] == 8 * (1 - row["advantages/zero_groups/fraction"])
        assert row["experience/rollout_logprob_diff/max"] < 1e-4  # of the weights that sampled, or it would be more
        assert row["weight_sync/probe_max_diff"] < 1e-4
        assert row["update/loss/mean"] != pytest.approx(math.log(2.0), abs=1e-6)  # of several updates, not the first
    # measured before the first update: in steps 1, 3 and 5 the policy is the reference
    kls = [row["experience/kl_ref/mean"] for row in found[1:]]
    assert all(kl < 1e-9 for kl in kls[0::2])
    assert all(kl > 1e-6 for kl in kls[1::2])
    samples = [json.loads(line) for line in (unbroken / "samples" / "step_000002.jsonl").read_text().splitlines()]
    trained = [row for row in samples if row["split"] == "train"]
    for group in {row["group_id"] for row in trained}:
        scores = {row["preferred"]: row["score"] for row in trained if row["group_id"] == group}
        assert scores.get(True, 1.0) > scores.get(False, 0.0)
    assert {row["preferred"] for row in trained} == {True, False, None}
    assert (unbroken / "final" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_without_preferences_says_so_and_keeps_its_weights(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "alike.yaml",
        {
            **PAIRS,
            "run": {"name": "alike", "dir": str(tmp_path)},
            "policy": {"model": "tiny:llama", "dtype": "float32", "lora": {"rank": 4}},
            "algorithm": {"name": "online_dpo"},
            "rewards": {"same": {"function": "format_regex", "args": {"pattern": "(?s).*"}}},
            "train": {"steps": 2, "sequences_per_update": 8, "lr": 1e-2},
        },
    )
    train(config)
    assert (
        "all responses to each prompt have the same score, so the policy is not updated"
        in config.with_suffix(".log").read_text()
    )
    found = rows(tmp_path / "alike")
    for row in found[1:]:
        assert (row["preference/pairs/total"], row["advantages/zero_groups/fraction"]) == (0.0, 1.0)
        assert "update/loss/mean" not in row
        assert row["weight_sync/version"] == row["step"]
    adapter = load_file(tmp_path / "alike" / "final" / "adapter_model.safetensors")
    assert not any(bool(weight.any()) for name, weight in adapter.items() if ".lora_B." in name)
