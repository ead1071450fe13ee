"""The best evaluation is found, and a run ends after long enough without a better evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.train import EarlyStopping, TrainConfig
from rlhf.controller.record import Best, RunRecord
from rlhf.errors import UserError
from rlhf.tracking.run_folder.folder import RunFolder


def best_of(metric: str | None = None, stopping: EarlyStopping | None = None) -> Best:
    train = TrainConfig(steps=10, lr=1.0, sequences_per_update=1, best_metric=metric, early_stopping=stopping)
    return Best.of(train, "eval/heldout/score", default_lower=False)


@pytest.mark.parametrize(
    ("metric", "stopping", "values", "improved", "over"),
    [
        (None, None, [0.1, 0.3, 0.3, 0.2], [0, 1], []),
        ("-eval/heldout/loss", None, [2.0, 1.0, 1.5], [0, 1], []),
        ("-eval/heldout/loss", EarlyStopping(patience=3), [float("nan"), 2.0, 3.0, 1.0], [1, 3], []),
        # 0.56 is 0.06 above 0.5; 0.54 was not enough, nor is 0.6 after it
        (None, EarlyStopping(patience=2, min_delta=0.05), [0.5, 0.54, 0.56, 0.6, 0.58], [0, 2], [4]),
        (None, EarlyStopping(patience=2), [0.5, 0.4, 0.5], [0], [2]),
        (None, None, [-float(step) for step in range(50)], [0], []),
    ],
    ids=["higher", "lower", "no number", "too small a gain", "resumed", "never over"],
)
def test_the_best_is_found_and_a_run_is_over_after_patience_also_after_a_resume(
    metric: str | None, stopping: EarlyStopping | None, values: list[float], improved: list[int], over: list[int]
) -> None:
    best, found = best_of(metric, stopping), []
    for step, value in enumerate(values):
        state, best = best.state(), best_of(metric, stopping)
        best.restore(state)
        found += [step] if best.improves({best.metric: value}, step) else []
        assert best.is_over == (step in over), step
    assert found == improved
    assert best.step == improved[-1]


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"eval/heldout/mine.*The metrics are: eval/heldout/score"):
        best_of("eval/heldout/mine").improves({"eval/heldout/score": 1.0}, 1)


def test_a_best_checkpoint_that_is_gone_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    with RunFolder.open(tmp_path, "run", resume=False) as folder:
        for step in (5, 10):
            folder.begin_checkpoint(step)
            folder.seal(folder.checkpoint(step), step=step)
            folder.commit_checkpoint(step)
        unused: Any = None
        record = RunRecord(folder=folder, tracker=unused, timeline=unused, progress=unused)
        best = best_of()
        record.restore_best(best, {"value": 0.5, "step": 5, "stale": 1})
        assert (best.value, best.step, best.stale, folder.best_checkpoint()) == (0.5, 5, 1, 5)
        record.restore_best(best, {"value": 0.5, "step": 4, "stale": 1})
        assert "the best checkpoint, of step 4, is gone" in caplog.text
        assert best.improves({"eval/heldout/score": 0.1}, 11)
