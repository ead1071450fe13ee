"""Learning-rate factors by hand."""

from __future__ import annotations

import pytest

from rlhf.engine.base import ScheduleSettings
from rlhf.engine.schedule import lr_factor


def factors(**settings: object) -> list[float]:
    schedule = ScheduleSettings(warmup_steps=2, total_steps=6, **settings)  # type: ignore[arg-type]
    return [lr_factor(schedule, step) for step in range(1, 9)]


def test_constant_after_the_rise() -> None:
    assert factors(kind="constant") == [0.5, 1, 1, 1, 1, 1, 1, 1]


def test_linear() -> None:
    # steps 3..6 have fallen by 1/4, 2/4, 3/4, 4/4 of 1 - 0.2
    assert factors(kind="linear", min_ratio=0.2) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine() -> None:
    # (1 + cos(pi k / 4)) / 2 at k = 1..4: 0.853553, 0.5, 0.146447, 0
    assert factors(kind="cosine") == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447, 0, 0, 0], abs=1e-6)


def test_no_rise() -> None:
    assert lr_factor(ScheduleSettings(kind="linear", warmup_steps=0, total_steps=4), 1) == 0.75
