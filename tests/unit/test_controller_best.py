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


def best_of(metric: str | None = None, stopping: EarlyStopping | None = None, *, lower: bool = False) -> Best:
    train = TrainConfig(steps=10, lr=1.0, sequences_per_update=1, best_metric=metric, early_stopping=stopping)
    return Best.of(train, "eval/heldout/score", default_lower=lower)


def test_higher_is_better_unless_told_otherwise() -> None:
    best = best_of()
    assert [best.improves({"eval/heldout/score": v}, step) for step, v in enumerate([0.1, 0.3, 0.3, 0.2])] == [
        True,
        True,
        False,
        False,
    ]
    assert best.step == 1
    falling = best_of("-eval/heldout/loss")
    assert [falling.improves({"eval/heldout/loss": v}, step) for step, v in enumerate([2.0, 1.0, 1.5])] == [
        True,
        True,
        False,
    ]


def test_a_run_is_over_after_patience_without_enough_gain() -> None:
    best = best_of(stopping=EarlyStopping(patience=2, min_delta=0.05))
    for step, (value, over) in enumerate([(0.5, False), (0.54, False), (0.56, False), (0.6, False), (0.58, True)]):
        best.improves({"eval/heldout/score": value}, step)
        assert best.is_over == over, step
    assert best.step == 2  # 0.56 is 0.06 above 0.5; 0.54 was not enough, nor is 0.6 after it


def test_it_goes_on_as_it_was_after_a_resume() -> None:
    best, resumed = (best_of(stopping=EarlyStopping(patience=2)) for _ in range(2))
    best.improves({"eval/heldout/score": 0.5}, 1)
    best.improves({"eval/heldout/score": 0.4}, 2)
    resumed.restore(best.state())
    resumed.improves({"eval/heldout/score": 0.5}, 3)
    assert resumed.is_over
    assert resumed.step == 1


def test_without_early_stopping_it_is_never_over() -> None:
    best = best_of()
    for step in range(50):
        best.improves({"eval/heldout/score": -float(step)}, step)
    assert not best.is_over


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"eval/heldout/mine.*The metrics are: eval/heldout/score"):
        best_of("eval/heldout/mine").improves({"eval/heldout/score": 1.0}, 1)


def test_what_is_no_number_is_never_the_best() -> None:
    best = best_of("-eval/heldout/loss", EarlyStopping(patience=3))
    improved = [best.improves({"eval/heldout/loss": v}, step) for step, v in enumerate([float("nan"), 2.0, 3.0, 1.0])]
    assert improved == [False, True, False, True]
    assert best.step == 3


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
        assert "the best checkpoint so far, of step 4, is gone" in caplog.text
        assert best.improves({"eval/heldout/score": 0.1}, 11)
