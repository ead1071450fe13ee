"""The benchmark beside TRL reads the right metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.online import read_ours


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
