"""A resumed run finds the place in the schedule by training steps."""

from __future__ import annotations

import pytest

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.schedule import lr_factor
from rlhf.engine.training_engine import ScheduleSettings


def record(steps: int, updates_per_step: int) -> EngineRecord:
    return EngineRecord(
        model="m",
        ranks=1,
        zero_stage=0,
        dtype="float32",
        optimizer="adamw",
        groups=[],
        frozen_weights="0",
        steps=steps,
        updates_per_step=updates_per_step,
    )


@pytest.mark.parametrize(
    ("before", "updates", "expected"),
    [
        (record(50, 1), 2, 100),
        (record(100, 2), 1, 50),
        (record(150, 3), 2, 100),
        (record(149, 3), 3, 149),  # one update had no token to train on
        (record(0, 4), 1, 0),
    ],
)
def test_the_steps_are_those_of_as_many_training_steps(before: EngineRecord, updates: int, expected: int) -> None:
    assert before.steps_of(record(0, updates)) == expected


def test_a_resume_with_twice_the_updates_continues_at_its_learning_rate() -> None:
    """Of 100 training steps with one update, those from 50 on get two: the rate falls from 0.51 to about 0."""
    one, two = (ScheduleSettings(kind="linear", warmup_steps=0, total_steps=total) for total in (100, 200))
    steps = record(50, 1).steps_of(record(0, 2))
    last, *rates = lr_factor(one, 50), *(lr_factor(two, steps + i) for i in range(1, 101))
    assert last == pytest.approx(0.51)  # 1 - 49 / 100
    assert (rates[0], rates[-1]) == pytest.approx((0.5, 0.005))  # 1 - 100 / 200, 1 - 199 / 200
