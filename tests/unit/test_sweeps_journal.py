"""The journal of a sweep survives a kill, and gives the results of trials. Run folders are made by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.config.files.load import load
from rlhf.config.files.sweep import load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.journal import Journal
from rlhf.sweeps.space import known_trials
from rlhf.sweeps.strategy import Listed
from rlhf.sweeps.trial_results import SweepResult, TrialResult, collect, explain_failure, write
from rlhf.tracking.run_folder.atomic import write_lines
from tests.fixtures.sweeps import write_sweep, wrote


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
    assert found.best == found.rows[0]  # one that has come to its end goes before a stopped one
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
