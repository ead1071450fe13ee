"""The benchmarks read the right metrics of a run. A simulation with measured rates gives the times of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.asynchronous import measured_system, recorded_groups
from benchmarks.online import read_ours
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning.lengths import Lengths
from rlhf.planning.simulate import simulate
from rlhf.planning.system import RecordedGroup, Schedule, System
from tests.fixtures.sources import ROOT

SYSTEM = System(
    lengths=Lengths(most=400, mean=60.0, sigma=1.0),
    **{"prompts_per_step": 8, "samples_per_prompt": 4, "prompt_tokens": 20.0, "engines": 1, "max_num_seqs": 64},
    **{"base_s": 0.02, "each_s": 0.003, "prefill_s": 0.003, "train_tokens_per_s": 300.0, "sync_s": 0.5, "load_s": 0.25},
    colocated=False,
    recomputes=True,
)


def run(keys: Sequence[str] = ()) -> Config:
    sizes = ["rollouts.prompts_per_step=8", "rollouts.samples_per_prompt=4", "train.sequences_per_update=32"]
    return next(iter(load(ROOT / "configs/grpo_smollm2.yaml", [*sizes, *keys]).runs.values()))


def groups(steps: int) -> list[RecordedGroup]:
    random = Random(0)
    lengths = [tuple(SYSTEM.lengths.draw(random) for _ in range(4)) for _ in range(8 * steps)]
    return [RecordedGroup(lengths=one) for one in lengths]


def row(step: int, batch: Sequence[RecordedGroup]) -> dict[str, Any]:
    """The metrics of a step, by hand: decoding steps until the longest response ends, and every token."""
    lengths = [tokens for group in batch for tokens in group.lengths]
    rollouts_s = 0.02 * max(lengths) + 0.003 * (sum(lengths) + 8 * 20)
    tokens = sum(lengths) + 32 * 20
    return {
        "step": step,
        "rollouts/prompt_tokens/mean": 20.0,
        "rollouts/tokens/total": float(tokens),
        "time/rollouts_s": rollouts_s,
        "time/weight_sync_s": 0.3,
        "time/probe_s": 0.2,
        "time/step_s": rollouts_s + tokens / 300.0 + 0.5,
    }


def test_the_rates_and_the_steps_of_a_run_are_found_again() -> None:
    recorded = groups(8)
    rows = [row(step, recorded[(step - 1) * 8 : step * 8]) for step in range(1, 9)]
    rows[0]["time/rollouts_s"] += 5.0  # a warm-up
    found = measured_system(run(), rows, recorded, after=1)
    assert (found.base_s, found.each_s) == pytest.approx((0.02, 0.003))
    rates = {"base_s": found.base_s, "each_s": found.each_s, "prefill_s": found.each_s}
    drawn = {"lengths": found.lengths, "max_num_seqs": found.max_num_seqs, "recorded": tuple(recorded)}
    assert found == replace(SYSTEM, **rates, **drawn, train_tokens_per_s=pytest.approx(300.0))
    predicted = simulate(found, Schedule(), steps=6, seed=0, warm_up=2)
    assert predicted.step_s == pytest.approx(sum(one["time/step_s"] for one in rows[2:]) / 6)


def test_a_rate_is_never_negative() -> None:
    recorded = [RecordedGroup(lengths=(10, 10, 10, 10 + step)) for step in range(4) for _ in range(8)]
    rows = [row(step, recorded[(step - 1) * 8 : step * 8]) for step in range(1, 5)]
    for one, seconds in zip(rows, (4.0, 3.0, 2.0, 1.0), strict=True):  # longer responses take less time
        one["time/rollouts_s"] = seconds
    found = measured_system(run(), rows, recorded, after=0)
    assert min(found.base_s, found.each_s) >= 0.0
    assert max(found.base_s, found.each_s) > 0.0


def test_runs_that_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    rows = [{"split": split, "group_id": 3, "response_tokens": tokens} for split, tokens in (("train", 5), ("eval", 9))]
    text = "".join(json.dumps(one) + "\n" for one in [*rows, *rows])
    (tmp_path / "samples" / "step_000001.jsonl").write_text(text, encoding="utf-8")
    part = recorded_groups(tmp_path)
    assert part == (RecordedGroup(lengths=(5, 5)),)
    with pytest.raises(UserError, match=r"tracking.samples_per_step is 16, expected 32"):
        measured_system(run(), [], part, after=0)
    with pytest.raises(UserError, match="with one engine that decodes a whole batch at once"):
        measured_system(run(["cluster.roles.rollout.max_num_seqs=8"]), [], part, after=0)


def test_waits_and_fractions_are_no_stages(tmp_path: Path) -> None:
    times = {"time/rollouts_s": 3.0, "time/update_s": 1.0, "time/step_s": 4.5, "time/weight_sync_s": 0.5}
    waits = {"time/trainer_waits_s": 3.0, "time/engines_idle/fraction": 0.4, "time/recovery_s": 9.0}
    counts = {"rollouts/tokens/total": 100, "rollouts/response_tokens/mean": 20.0}
    rows = [{"step": step, "time_s": 5.0 * step, **times, **waits, **counts} for step in (1, 2, 3)]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = read_ours(tmp_path, steps=2, peak_gib=1.0)
    assert result.stages == {"rollouts": pytest.approx(3.0), "update": pytest.approx(1.0), "weight_sync": 0.5}
    assert (result.seconds, result.tokens) == (10.0, 200)
