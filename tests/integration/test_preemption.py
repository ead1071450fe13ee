"""SIGTERM to a run gives exit code 75, a checkpoint of the last finished step, and an exact continuation.

Real runs of the tiny model are in this process, on the session's Ray; a second thread sends the signal.
test_failures.py covers the end of a run's local Ray.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.integration.faults import GRPO, SFT, actor_processes, checkpoints, once, steps_done, write_run
from tests.integration.recipes import rows, without_clocks

SELDOM: Mapping[str, Any] = {"train": {"steps": 100_000, "checkpoint_every": 100_000}}
STEPS_BEFORE = 3


def preempted(config: Path, run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the output of a run that is stopped after some steps."""
    tell = once(lambda: steps_done(run) >= STEPS_BEFORE, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with tell:
        assert main(["train", str(config), "--quiet", *arguments]) == 75
    assert not actor_processes()
    return capsys.readouterr().err


def compare_with_unbroken(config: Path, run: Path) -> None:
    """Continue for two steps; the rows must equal an undisturbed run's."""
    kept = steps_done(run)
    assert checkpoints(run) == [f"step_{kept:06d}"]
    assert not (run / "errors.jsonl").exists() or not (run / "errors.jsonl").read_text(encoding="utf-8")
    more = [f"train.steps={kept + 2}", "--quiet"]
    assert main(["train", str(config), "--resume", "auto", *more]) == 0
    assert main(["train", str(config), f"run.name={run.name}-unbroken", *more]) == 0
    assert without_clocks(rows(run)) == without_clocks(rows(run.with_name(f"{run.name}-unbroken")))


@pytest.mark.slow
def test_an_online_run_puts_its_rollouts_aside(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, run = write_run(tmp_path, "grpo", GRPO, SELDOM), tmp_path / "grpo"
    said = preempted(config, run, capsys)
    assert f"rlhf: preempted: a checkpoint of step {steps_done(run)} is written" in said
    compare_with_unbroken(config, run)


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_lost_but_nothing_before_it(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, run = write_run(tmp_path, "long", SFT, {"cluster": {"roles": None}}), tmp_path / "long"

    def hang() -> None:
        actor_processes("SupervisedWorker")[0].suspend()
        os.kill(os.getpid(), signal.SIGTERM)

    with once(lambda: steps_done(run) >= STEPS_BEFORE, hang):
        assert main(["train", str(config), "--quiet", "train.preemption_grace_s=2"]) == 75
    assert "was not finished within 2 s (train.preemption_grace_s" in capsys.readouterr().err
    assert not actor_processes()
    assert main(["train", str(config), "--quiet", "--resume", "auto", f"train.steps={steps_done(run) + 1}"]) == 0
