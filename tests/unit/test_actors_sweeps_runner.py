"""The loop of a sweep continues after interruptions. tests/integration/test_sweep.py runs whole sweeps."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import actors.sweeps.runner
from actors.sweeps.runner import _wait_for_leftovers, run_sweep
from actors.sweeps.trial_process import MachineShare
from rlhf.commands.sweep import sweep
from rlhf.config.files.sweep import load_sweep
from rlhf.errors import Preempted, RunError, UserError
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.space import known_trials
from rlhf.tracking.run_folder.lock import lock_folder
from tests.fixtures.sweeps import write_sweep


@pytest.fixture(autouse=True)
def _other_tests_have_their_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda level: None)


@pytest.mark.parametrize("stage", ["", "sft"])
def test_trials_of_a_killed_sweep_that_still_end_are_waited_for(tmp_path: Path, stage: str) -> None:
    with Journal.open(load_sweep(write_sweep(tmp_path)), resume=False) as journal:
        _wait_for_leftovers(journal, within_s=0.0)
        run = journal.run_folder(3) / stage
        run.mkdir(parents=True)
        held = lock_folder(run, key="run.name")
        with pytest.raises(UserError, match=rf"{run} is in use by process {os.getpid()}"):
            _wait_for_leftovers(journal, within_s=0.0)
        threading.Timer(0.5, os.close, [held]).start()
        _wait_for_leftovers(journal, within_s=30.0)
        os.close(lock_folder(run, key="run.name"))


@pytest.fixture
def _no_trial_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a trial was started")

    monkeypatch.setattr(actors.sweeps.runner, "TrialProcess", started)


@pytest.mark.usefixtures("_no_trial_starts")
def test_failures_of_a_sweep_that_goes_on_count(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, max_failures=0))
    with Journal.open(sweep, resume=False) as journal:
        journal.add(0, known_trials(sweep)[0])
        journal.end(0, "failed", "exit 1: no memory")
    with pytest.raises(RunError, match=r"more than sweep.max_failures = 0: trial-000: exit 1: no memory"):
        run_sweep(sweep, resume=True, quiet=True)
    with pytest.raises(AssertionError):
        run_sweep(sweep, resume=True, retry_failed=True, quiet=True)


@pytest.mark.usefixtures("_no_trial_starts")
def test_a_suggestion_that_is_no_valid_run_is_a_failed_trial(tmp_path: Path) -> None:
    """Only the ends of each parameter are checked before the start, and not all of their combinations."""
    parameters = {"train.steps": {"values": [9, 4]}, "train.warmup_steps": {"values": [0, 8]}}
    sweep = load_sweep(
        write_sweep(tmp_path, parameters=parameters, method={"name": "bayesian", "trials": 1}, max_failures=0)
    )
    with Journal.open(sweep, resume=False) as journal:
        journal.add(0, {"train.steps": 4, "train.warmup_steps": 8})
    with pytest.raises(RunError, match=r"trial-000: .*a trial with train.steps=4, train.warmup_steps=8 is not a valid"):
        run_sweep(sweep, resume=True, quiet=True)


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_a_sweep_and_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ended: type[BaseException]
) -> None:
    interrupted: list[object] = []

    class Trial:
        def __init__(self, *_: object, **__: object) -> None:
            os.kill(os.getpid(), number)

        def poll(self) -> int | None:
            return 75 if interrupted else None

        def interrupt(self) -> None:
            interrupted.append(self)

    monkeypatch.setattr(actors.sweeps.runner, "_shares", lambda *_: [MachineShare()])
    monkeypatch.setattr(actors.sweeps.runner, "TrialProcess", Trial)
    with pytest.raises(ended, match=r"trials in progress were ended: trial-000 without a checkpoint$"):
        sweep(write_sweep(tmp_path), quiet=True)
    (tmp_path / "rates/trials/trial-000/checkpoints/step_000012").mkdir(parents=True)
    interrupted.clear()
    with pytest.raises(ended, match=r"were ended: trial-000 with a checkpoint of step 12$"):
        sweep(write_sweep(tmp_path), resume=True, quiet=True)
    assert len(interrupted) == 1
