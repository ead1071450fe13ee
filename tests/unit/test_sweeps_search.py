"""Optuna's searcher and successive halving suggest and stop trials, and resume after a kill.

Trials are made by hand: the rows of a run are written at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from actors.sweeps.search import Bayesian, strategy_of
from rlhf.config.files.sweep import Sweep, load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.space import known_trials
from tests.fixtures.sweeps import write_sweep, wrote

ASHA = {"name": "asha", "trials": 4, "grace_steps": 2, "reduction_factor": 2}


def bayesian(folder: Path, trials: int) -> Sweep:
    parameters = {
        "train.lr": {"min": 1e-4, "max": 1e-2, "scale": "log"},
        "train.lr_schedule": {"values": ["linear", "cosine"]},
    }
    return load_sweep(write_sweep(folder, method={"name": "bayesian", "trials": trials}, parameters=parameters))


def run_all(sweep: Sweep, *, resume: bool, most: int) -> list[float]:
    """Return the rates of the trials of this start. The loss is least at 1e-3, and with cosine."""
    rates = []
    with Journal.open(sweep, resume=resume) as journal:
        method = strategy_of(sweep, journal, known_trials(sweep))
        while len(rates) < most and (trial := method.next()) is not None:
            rate = trial.parameters["train.lr"]
            wrote(
                journal, trial.number, s9=abs(rate - 1e-3) * 1e3 + (trial.parameters["train.lr_schedule"] == "linear")
            )
            journal.end(trial.number, "finished")
            method.ended(trial)
            rates.append(rate)
    return rates


def test_optuna_comes_near_the_best_rate_and_goes_on_without_repeating_itself(tmp_path: Path) -> None:
    sweep = bayesian(tmp_path, 30)
    first = run_all(sweep, resume=False, most=4)
    rest = run_all(sweep, resume=True, most=99)
    assert (len(first), len(rest)) == (4, 26)
    assert len({*first, *rest}) == 30
    assert all(1e-4 <= rate <= 1e-2 for rate in (*first, *rest))
    early, late = (sorted(abs(rate - 1e-3) for rate in rates) for rates in ([*first, *rest[:6]], rest[-10:]))
    assert late[5] < early[5]  # medians: it looks where the loss was low


def test_a_trial_that_a_kill_left_is_first_and_counts_once(tmp_path: Path) -> None:
    sweep = bayesian(tmp_path, 2)
    with Journal.open(sweep, resume=False) as journal:
        begun = Bayesian(sweep, journal, trials=2).next()
    with Journal.open(sweep, resume=True) as journal:
        method = Bayesian(sweep, journal, trials=2)
        again = method.next()
        assert again.parameters == begun.parameters
        journal.end(0, "failed", "exit 1")
        method.ended(again)
        assert method.next() is not None
        assert method.next() is None


def test_without_optuna_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with Journal.open(bayesian(tmp_path, 2), resume=False) as journal, pytest.raises(UserError, match="extra `sweeps`"):
        Bayesian(bayesian(tmp_path, 2), journal, trials=2)


def test_the_worse_half_is_stopped_at_each_look(tmp_path: Path) -> None:
    """Looks are at steps 2, 4 and 8. The better half of the trials so far goes on, by the median.

    The first trial always goes on. A loss of 3 is worse than 2 and stops. A loss of 1 is better and goes on.
    """
    sweep = load_sweep(write_sweep(tmp_path, method=ASHA))
    with Journal.open(sweep, resume=False) as journal:
        method = strategy_of(sweep, journal, known_trials(sweep))
        trials = [method.next() for _ in range(4)]
        reports = [(0, 0, 99.0), (0, 2, 2.0), (1, 2, 3.0), (2, 2, 1.0), (2, 4, 1.0), (0, 4, 2.0)]
        stops = [method.report(trials[number], step, loss) for number, step, loss in reports]
        assert stops == [False, False, True, False, False, True]


def test_successive_halving_knows_after_a_kill_what_it_knew(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, method=ASHA))
    with Journal.open(sweep, resume=False) as journal:
        method = strategy_of(sweep, journal, known_trials(sweep))
        for number, loss in enumerate((2.0, 1.0)):
            method.next()
            wrote(journal, number, s0=9.0, s2=loss)
            journal.end(number, "finished")
    with Journal.open(sweep, resume=True) as journal:
        method = strategy_of(sweep, journal, known_trials(sweep))
        trial = method.next()
        assert trial.number == 2
        assert method.report(trial, 2, 1.8)  # the median of 2.0 and 1.0 is 1.5
