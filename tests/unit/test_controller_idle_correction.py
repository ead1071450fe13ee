"""The warning about an idle correction comes once, after the first steps, and only then."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rlhf.algorithms.grpo import GRPOConfig
from rlhf.controller.idle_correction import STEPS, IdleCorrection

QUIET = {
    "experience/rollout_logprob_diff/max": 2e-6,
    "experience/rollout_weight_truncated/fraction": 0.0,
    "experience/rollout_weight_masked/fraction": 0.0,
    "experience/rollout_rejected/fraction": 0.0,
    "update/clip_fraction/mean": 0.0,
}


def warnings(
    caplog: pytest.LogCaptureFixture,
    correction: dict[str, Any] | None,
    rows: list[dict[str, float]],
    updates_per_step: int = 1,
) -> list[str]:
    config = GRPOConfig.model_validate({"name": "grpo", "correction": correction})
    watch = IdleCorrection(config, updates_per_step=updates_per_step)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rlhf.controller.idle_correction"):
        for row in rows:
            watch.see(row)
    return caplog.messages


@pytest.mark.parametrize(
    ("correction", "updates"),
    [({"preset": "token_tis"}, 1), ({"preset": "k3_rs"}, 4), ({"preset": "bypass_clip"}, 1), ({"mode": "bypass"}, 1)],
)
def test_a_correction_that_touches_nothing_is_named_once(
    caplog: pytest.LogCaptureFixture, correction: dict[str, Any], updates: int
) -> None:
    found = warnings(caplog, correction, [QUIET] * 3 * STEPS, updates)
    assert len(found) == 1
    assert "changed no token in 5 steps" in found[0]
    assert "2.0e-06 nats" in found[0]
    assert warnings(caplog, correction, [QUIET] * (STEPS - 1), updates) == []
    warming = [{"time/step_s": 1.0}] * STEPS  # while the critic alone is trained
    assert warnings(caplog, correction, warming, updates) == []


@pytest.mark.parametrize(
    ("correction", "updates", "changes"),
    [
        ({"preset": "token_tis"}, 1, {"experience/rollout_weight_truncated/fraction": 0.01}),
        ({"preset": "icepop"}, 1, {"experience/rollout_weight_masked/fraction": 0.01}),
        ({"preset": "geo_rs"}, 1, {"experience/rollout_rejected/fraction": 0.01}),
        ({"preset": "bypass_clip"}, 1, {"update/clip_fraction/mean": 0.01}),
        ({"preset": "token_tis"}, 1, {"experience/rollout_logprob_diff/max": 0.1}),  # the correction may act later
        ({"preset": "token_tis"}, 1, {"experience/rollout_logprob_diff/max": float("nan")}),
        ({"preset": "bypass_clip"}, 2, {}),  # the second update's ratio moves
        ({"mode": "policy_gradient"}, 1, {}),  # this mode has no bound
        (None, 1, {}),
    ],
)
def test_others_are_not(
    caplog: pytest.LogCaptureFixture, correction: dict[str, Any] | None, updates: int, changes: dict[str, float]
) -> None:
    assert warnings(caplog, correction, [QUIET, {**QUIET, **changes}, *[QUIET] * STEPS], updates) == []


def test_the_clip_counts_in_bypass_mode_alone(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**QUIET, "update/clip_fraction/mean": 0.1}] * STEPS
    assert len(warnings(caplog, {"preset": "token_tis"}, rows, 2)) == 1
