"""The trials of a sweep depend only on parameters, seed and number. Journal, methods and processes survive a kill.

Trials are made by hand: the rows of a run are written at once. tests/integration/test_sweep.py runs whole sweeps.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
import pytest
from rich.console import Console

import actors.sweeps.runner
from actors.sweeps.runner import _wait_for_leftovers, run_sweep
from actors.sweeps.search import Bayesian, strategy_of
from actors.sweeps.trial_process import MachineShare, TrialProcess, wait_for_all
from rlhf.commands.sweep import sweep
from rlhf.config.files.load import load
from rlhf.config.files.sweep import Sweep, load_sweep
from rlhf.config.schema.sweep import Parameter
from rlhf.errors import Preempted, RunError, UserError
from rlhf.process.stopping import StopRequest
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.space import corners, draw, drawn, grid, known_trials
from rlhf.sweeps.strategy import Listed
from rlhf.sweeps.trial_results import SweepResult, TrialResult, collect, explain_failure, write
from rlhf.tracking.run_folder.atomic import write_lines
from rlhf.tracking.run_folder.lock import lock_folder
from tests.fixtures.sweeps import write_sweep, wrote

RATE = Parameter(min=1e-4, max=1e-2, scale="log")
SIZES = Parameter(values=(8, 16, None))
STEPS = Parameter(min=0.0, max=0.5, step=0.25)
COUNT = Parameter(min=1, max=4, integer=True)


def test_a_grid_has_every_combination_the_last_key_fastest() -> None:
    found = grid({"a": Parameter(values=(1, 2)), "b": STEPS})
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in (0.0, 0.25, 0.5)]


def test_draws_depend_on_their_number_alone() -> None:
    parameters = {"rate": RATE, "size": SIZES}
    three = [draw(parameters, seed=1, number=n) for n in range(3)]
    assert [draw(parameters, seed=1, number=n) for n in range(5)][:3] == three
    assert draw(parameters, seed=2, number=0) != three[0]
    assert len({trial["rate"] for trial in three}) == 3


def test_a_log_scale_halves_at_the_geometric_mean() -> None:
    """sqrt(1e-4 * 1e-2) = 1e-3 is the median: 1000 of 2000 draws are below, give or take 22 (a standard deviation)."""
    found = [drawn(RATE, Random(n)) for n in range(2000)]
    assert all(1e-4 <= rate <= 1e-2 for rate in found)
    assert abs(sum(rate < 1e-3 for rate in found) - 1000) < 100
    assert all(float(f"{rate:.6g}") == rate for rate in found)


def test_steps_and_whole_numbers_reach_both_ends() -> None:
    assert {drawn(STEPS, Random(n)) for n in range(60)} == {0.0, 0.25, 0.5}
    found = {drawn(COUNT, Random(n)) for n in range(60)}
    assert found == {1, 2, 3, 4}
    assert all(isinstance(count, int) for count in found)


def test_corners_are_each_value_and_end_once() -> None:
    found = list(corners({"rate": RATE, "size": SIZES}))
    first = {"rate": 1e-4, "size": 8}
    assert found == [first, first | {"rate": 1e-2}, first | {"size": 16}, first | {"size": None}]


def test_a_sweep_that_was_killed_knows_its_trials(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    known = known_trials(sweep)
    with Journal.open(sweep, resume=False) as journal:
        listed = Listed(journal, known)
        assert None not in (listed.next(), listed.next())
        journal.end(0, "failed", "exit 1: token hf_abcdefghijklmnopqrstuvwx was wrong")
        with pytest.raises(UserError, match=r"sweep.name: .* is in use by process"):
            Journal.open(sweep, resume=True)
    with (sweep.folder / "trials.jsonl").open("a") as file:
        file.write('{"event": "tri')  # cut by the kill
    with pytest.raises(UserError, match=r"already holds a sweep\. Continue it with --resume auto"):
        Journal.open(sweep, resume=False)
    with Journal.open(sweep, resume=True) as journal:
        assert {n: trial.state for n, trial in journal.trials.items()} == {0: "failed", 1: "open"}
        assert journal.trials[0].error == "exit 1: token *** was wrong"
        assert journal.trials[1].parameters == known[1]
        assert Listed(journal, known).left == [1, 2]
        journal.end(0, "open")
        assert Listed(journal, known).left == [0, 1, 2]
    with Journal.open(sweep, resume=True) as journal:
        assert journal.trials[0].state == "open"


def test_only_more_trials_may_be_asked_of_a_sweep_that_goes_on(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    (tmp_path / "rates" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"sweep\.dir: {tmp_path}/rates cannot be written: Is a directory"):
        Journal.open(sweep, resume=False)
    (tmp_path / "rates" / ".lock").rmdir()
    Journal.open(sweep, resume=False).close()
    more = load_sweep(write_sweep(tmp_path), ["sweep.method.trials=5", "sweep.concurrency=1"])
    Journal.open(more, resume=True).close()
    for change in ("sweep.seed=1", "train.weight_decay=0.5", "sweep.metric=-eval/heldout/perplexity"):
        other = load_sweep(write_sweep(tmp_path), ["sweep.method.trials=5", change])
        with pytest.raises(UserError, match=f"with other settings: .*{change.partition('=')[0]}"):
            Journal.open(other, resume=True)


def test_what_comes_of_the_trials(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    known = known_trials(sweep)
    with Journal.open(sweep, resume=False) as journal:
        for number, values in enumerate(known):
            journal.add(number, values)
        wrote(journal, 0, s0=3.0, s4=1.0, s9=2.0)
        wrote(journal, 1, s0=3.0, s4=0.5)
        journal.end(0, "finished")
        journal.end(1, "stopped")
        journal.end(2, "failed", "exit 1: the end")
        found = collect(sweep, journal)
        write(sweep, found)
    assert [(row.value, row.best_value, row.best_step, row.step) for row in found.rows] == [
        (2.0, 1.0, 4, 9),
        (0.5, 0.5, 4, 4),
        (None, None, None, 0),
    ]
    assert found.best == found.rows[0]  # a finished trial comes before a stopped trial
    lines = [json.loads(line) for line in (sweep.folder / "results.jsonl").read_text().splitlines()]
    assert lines[2]["error"] == "exit 1: the end"
    assert lines[0]["train.lr"] == known[0]["train.lr"]
    header = (sweep.folder / "results.csv").read_text().splitlines()[0]
    assert header.startswith("trial,state,train.lr,value,best_value")
    (best,) = load(sweep.folder / "best.yaml").runs.values()
    assert best.train.lr == known[0]["train.lr"]
    assert best.run.name == "tiny-rates"


def test_why_a_trial_failed(tmp_path: Path) -> None:
    log = "INFO\nrlhf: error: data.train: is\n  empty\n"
    assert explain_failure(tmp_path, log, 2) == "exit 2: data.train: is empty"
    assert explain_failure(tmp_path, "one\ntwo\n\nthree\nfour\n", 1) == "exit 1: two / three / four"
    write_lines(tmp_path / "errors.jsonl", [{"message": "rank 0 is gone"}])
    assert explain_failure(tmp_path, "INFO\n", -9) == "killed by signal 9: rank 0 is gone"


def test_the_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    def row(number: int, error: str | None = None) -> TrialResult:
        numbers = {"value": 0.512345, "best_value": 0.6, "best_step": 3, "step": 400, "time_s": 754.0}
        parameters = {"train.lr": 5.0294512e-05, "algorithm.kl.coef": 0.0125, "policy.lora.rank": 16}
        state = "finished" if error is None else "failed"
        name = f"trial-{number:03d}"
        return TrialResult(trial=name, state=state, parameters=parameters, error=error, **numbers)

    rows = (replace(row(0), value=0.5), row(1), row(2, "exit 1: policy rank 0 died, of too little memory"))
    shown = io.StringIO()
    found = SweepResult(folder=tmp_path / "rates", metric="eval/heldout/score", rows=rows, best=rows[1])
    Console(file=shown, width=80).print(found.to_table())
    lines = shown.getvalue().splitlines()
    cells = ["5.03e-05", "0.0125", "16", "0.512", "400", "12 min 34 s"]
    (best,) = [line for line in lines if "trial-001" in line]
    assert best.replace("│", " ").split() == ["*", "trial-001", *cells[:-1], "12", "min", "34", "s", "finished"]
    assert [line.split()[-1] for line in lines[-5:-2]] == ["finished", "finished", "failed"]
    assert lines[-1].rstrip() == "trial-002 failed: exit 1: policy rank 0 died, of too little memory"
    assert "…" not in shown.getvalue()
    assert found.describe_best() == "trial-001"
    tied = replace(found, rows=(row(0), *rows[1:], *(row(number) for number in range(3, 12))), best=row(0))
    assert [one.trial for one in tied.ties][:2] == ["trial-001", "trial-003"]  # trial-002 failed
    names = ", ".join(one.trial for one in tied.ties[:8])
    assert tied.describe_best() == f"trial-000, in a tie with {names} and 2 more"
    Console(file=shown, width=80).print(tied.to_table())
    assert "* best, in a tie" in shown.getvalue()


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
    assert late[5] < early[5]  # medians: later trials are near the lowest loss


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
    """Trials are compared at steps 2, 4 and 8. The better half of the trials so far goes on, by the median.

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


DEADLINE_S = 60.0
SLEEP = ["sleep", "600"]
SWEEP = """
import time
from pathlib import Path
from actors.sweeps.trial_process import MachineShare, TrialProcess
print(TrialProcess(["sleep", "600"], Path("/dev/null"), MachineShare()).process.pid, flush=True)
time.sleep(60)
"""


def test_the_log_of_a_trial_has_its_output(tmp_path: Path) -> None:
    log, until = tmp_path / "log", time.monotonic() + DEADLINE_S
    script = "import sys; print('out'); sys.exit('why')"
    process = TrialProcess([sys.executable, "-c", script], log, MachineShare())
    while (code := process.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert code == 1
    assert sorted(log.read_text().splitlines()) == ["out", "why"]


def test_a_process_has_its_share_and_ends_when_it_is_told(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    process = TrialProcess(SLEEP, tmp_path / "log", MachineShare(cores=(core,), gpus=("1", "3")))
    started = psutil.Process(process.process.pid)
    assert started.cpu_affinity() == [core]
    assert started.environ()["CUDA_VISIBLE_DEVICES"] == "1,3"
    process.interrupt()
    wait_for_all([process], StopRequest())
    assert process.process.returncode == -signal.SIGTERM


def test_a_process_ends_with_the_sweep_however_that_ends() -> None:
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    trial = psutil.Process(int(sweep.stdout.readline()))
    sweep.kill()
    sweep.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs([trial], timeout=DEADLINE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupt_kills_what_does_not_end(tmp_path: Path) -> None:
    request, stuck = StopRequest(), TrialProcess(SLEEP, tmp_path / "log", MachineShare(), grace_s=600.0)
    psutil.Process(stuck.process.pid).suspend()
    request.interrupted.set()
    stuck.interrupt()
    wait_for_all([stuck], request)
    assert stuck.process.poll() is not None
