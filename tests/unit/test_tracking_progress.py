"""The three displays behind one interface."""

from __future__ import annotations

import io
import time

import pytest

from rlhf.tracking import progress
from rlhf.tracking.progress import LineProgress, LiveProgress, Progress, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_one_line_a_step_with_numbers_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with open_progress(10, show=["rewards/score/mean", "eval/held/score"], stream=out) as display:
        assert type(display) is LineProgress
        display.step(0, {"eval/held/score": 0.25, "update/lr": 1.0})
        for step in (1, 2):
            clock.now += 5.0
            display.stage("rollouts", 3, 64)
            display.step(step, {"rewards/score/mean": step / 3})
    assert out.getvalue().splitlines() == [
        "step 0/10  eval/held/score 0.25  left ?",
        "step 1/10  eval/held/score 0.25  rewards/score/mean 0.333  left 45 s",  # 9 steps of 5 s
        "step 2/10  eval/held/score 0.25  rewards/score/mean 0.667  left 40 s",
    ]


def test_a_long_step_speaks_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    display = open_progress(10, done_steps=4, stream=out)
    for done in range(13):
        display.stage("rollouts", done, 64)
        clock.now += 10.0
    assert out.getvalue().splitlines() == ["step 5/10: rollouts 6/64", "step 5/10: rollouts 12/64"]


def test_live_display_shows_bars_stage_and_numbers() -> None:
    out = Terminal()
    with open_progress(10, done_steps=2, show=["update/kl_old/mean"], stream=out) as display:
        assert type(display) is LiveProgress
        display.step(3, {"update/kl_old/mean": 0.0123})
        display.stage("rollouts", 37, 64)
        display.note("checkpoint at step 3 [kept]")
    shown = out.getvalue()
    for text in ("steps", "3/10", "rollouts", "37/64", "update/kl_old/mean", "0.0123", "checkpoint at step 3 [kept]"):
        assert text in shown


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = Terminal()
    with open_progress(10, quiet=True, stream=out) as display:
        assert type(display) is Progress
        display.stage("rollouts", 1, 2)
        display.step(1, {})
        display.note("x")
    assert out.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(2) as display:
        display.step(1, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 1/2")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-1, "0 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.0, "3"), (0.12345, "0.123"), (1e-6, "1e-06"), (float("nan"), "nan"), (-2.5, "-2.5")]
)
def test_number(value: float, text: str) -> None:
    assert progress.number(value) == text
