"""Real sweeps run over tiny runs: a crashed run is a row of the table, and sweeps stop, die and continue.

Each trial is a process with a separate Ray. The short sweep is in every run of the tests, all others are slow.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import RunRecord

import rlhf
from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.sinks.tracker import read_metrics
from tests.integration.recipes import RUN, rows, without_clocks

CRASHES = 1e30  # a learning rate after which no loss is finite


def sweep_file(folder: Path, name: str, **sweep: Any) -> Path:
    """Write a sweep of the tiny run over learning rates."""
    section: dict[str, Any] = {
        "name": name,
        "dir": str(folder),
        "config": RUN,
        "parameters": {"train.lr": {"values": [1e-3, CRASHES, 1e-2]}},
        "method": {"name": "grid"},
        "metric": "-eval/heldout/loss",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"sweep": section | sweep}, sort_keys=False), encoding="utf-8")
    return path


def start(file: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `rlhf sweep` in a separate session."""
    with file.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf.cli", "sweep", str(file), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, timeout_s: float = 240.0) -> None:
    """Wait until the condition holds; the process must go on meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the sweep has ended"
        assert time.monotonic() < deadline, f"waited {timeout_s} s"
        time.sleep(0.2)


def trial_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes that run a trial of this folder, with all descendants."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder / "trials") in word for word in process.info["cmdline"] or ()):
            found += [process, *process.children(recursive=True)]
    return found


def results(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "results.jsonl")


def wrote(folder: Path, trial: int, step: int) -> bool:
    """Return whether a trial has written this step's row."""
    return any(row["step"] >= step for row in read_metrics(folder / "trials" / f"trial-{trial:03d}"))


@pytest.mark.slow
def test_a_crash_of_one_trial_is_not_that_of_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(tmp_path, "crash")
    assert main(["sweep", str(file), "--quiet"]) == 0
    folder = tmp_path / "crash"
    first, crashed, best = results(folder)
    assert [row["state"] for row in (first, crashed, best)] == ["finished", "failed", "finished"]
    assert "not finite in optimizer step 2" in crashed["error"]
    assert best["value"] < first["value"]
    with (folder / "results.csv").open(encoding="utf-8") as text:
        assert [float(row["train.lr"]) for row in csv.DictReader(text)] == [1e-3, CRASHES, 1e-2]
    shown = capsys.readouterr().out
    assert "* trial-002" in shown
    assert "not finite" in " ".join(shown.split())
    assert load(folder / "best.yaml").stages["tiny-crash"].train.lr == 1e-2  # type: ignore[union-attr]
    run = folder / "trials" / "trial-002"
    assert (run / "final" / "model.safetensors").exists()
    assert rows(run)[-1]["eval/heldout/loss"] == best["value"]
    assert not trial_processes(folder)
    capsys.readouterr()
    assert main(["sweep", str(file), "--quiet"]) == 2
    assert "already holds a sweep" in capsys.readouterr().err
    assert main(["sweep", str(file), "--quiet", "--resume", "auto"]) == 0  # nothing is left to do
    assert results(folder) == [first, crashed, best]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """The second trial equals an unkilled trial; the first is not touched; the failed trial stays failed."""
    changes = ["train.steps=400", "train.checkpoint_every=5", "eval.every=50", "sweep.concurrency=1"]
    parameters = {"train.lr": {"values": [CRASHES, 1e-3, 2e-3]}}
    file = sweep_file(tmp_path, "killed", parameters=parameters)
    folder = tmp_path / "killed"
    sweep = start(file, *changes)
    wait_until(lambda: wrote(folder, 1, 60), sweep)
    os.kill(sweep.pid, signal.SIGKILL)
    for process in trial_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    sweep.wait(timeout=30)
    assert not (folder / "trials" / "trial-001" / "final").exists()
    assert (folder / "trials" / "trial-001" / "checkpoints" / "latest").exists()
    failed = (folder / "trials" / "trial-000" / "metrics.jsonl").read_bytes()

    again = start(file, *changes, "--resume", "auto")
    assert again.wait(timeout=600) == 0, file.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    assert [row["state"] for row in results(folder)] == ["failed", "finished", "finished"]
    assert (folder / "trials" / "trial-000" / "metrics.jsonl").read_bytes() == failed
    assert "resumed from the checkpoint" in (folder / "trials" / "trial-001.log").read_text(encoding="utf-8")

    unbroken = sweep_file(tmp_path, "unbroken", parameters={"train.lr": {"values": [1e-3]}})
    rlhf.sweep(unbroken, changes, quiet=True)
    ours = without_clocks(rows(folder / "trials" / "trial-001"))
    assert ours == without_clocks(rows(tmp_path / "unbroken" / "trials" / "trial-000"))

    failed_again = start(file, *changes, "--resume", "auto", "--retry-failed")
    assert failed_again.wait(timeout=300) == 0
    log = (folder / "trials" / "trial-000.log").read_text(encoding="utf-8")
    assert log.count("not finite in optimizer step 2") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_ends_leaves_no_process(tmp_path: Path, how: signal.Signals) -> None:
    file = sweep_file(tmp_path, "ended", parameters={"train.lr": {"values": [1e-3, 2e-3]}})
    folder = tmp_path / "ended"
    sweep = start(file, "train.steps=100000", "eval.every=50")
    wait_until(lambda: wrote(folder, 0, 5) and wrote(folder, 1, 5), sweep)
    running = trial_processes(folder)
    assert running
    os.kill(sweep.pid, how)
    assert sweep.wait(timeout=120) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    _, alive = psutil.wait_procs(running, timeout=0.0 if how == signal.SIGINT else 90.0)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert {row["state"] for row in map(json.loads, (folder / "trials.jsonl").open()) if row["event"] == "end"} == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_stops_the_worse_trials_early(tmp_path: Path) -> None:
    """Only the third of four draws is bad. Its loss at step 4 is worse than the earlier trials' losses. So the trial
    stops soon after, with a checkpoint and without a failure."""
    method = {"name": "asha", "trials": 4, "grace_steps": 4, "reduction_factor": 2}
    parameters = {"train.lr": {"values": [1e-2, 1e-7]}}
    file = sweep_file(tmp_path, "asha", method=method, parameters=parameters, seed=8)
    found = rlhf.sweep(file, ["train.steps=300", "eval.every=4", "train.checkpoint_every=4"], quiet=True)
    by_rate: dict[float, set[str]] = {}
    for row in found.rows:
        by_rate.setdefault(row.parameters["train.lr"], set()).add(row.state)
    assert by_rate[1e-7] == {"stopped"}
    assert "finished" in by_rate[1e-2]
    assert found.best is not None
    assert found.best.parameters["train.lr"] == 1e-2
    stopped = found.rows[2]
    assert 4 <= stopped.step < 300
    assert not (found.folder / "trials" / stopped.trial / "final").exists()
    assert not trial_processes(found.folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_share_what_the_reference_says(tmp_path: Path) -> None:
    """The trials also form one group of W&B, with the parameters in the config."""
    pairs = {"task": "running_totals", "split": "pairs", "size": 32}
    run = RUN | {
        "algorithm": {"name": "dpo"},
        "data": {"train": pairs, "eval": pairs | {"seed": 5, "size": 16}, "apply_chat_template": False},
        "tracking": {"wandb": "offline"},
    }
    file = sweep_file(tmp_path, "dpo", config=run, parameters={"algorithm.beta": {"values": [0.1, 0.3]}}, concurrency=1)
    found = rlhf.sweep(file, quiet=True)
    assert [row.state for row in found.rows] == ["finished"] * 2
    assert len(list((found.folder / "trials" / "reference_logprobs").iterdir())) == 2  # training and evaluation set
    logs = [(found.folder / "trials" / f"{row.trial}.log").read_text(encoding="utf-8") for row in found.rows]
    assert [log.count("are written to") for log in logs] == [2, 0]
    assert [log.count("are read from") for log in logs] == [0, 2]
    for row in found.rows:
        (record,) = (found.folder / "trials" / row.trial / "wandb").glob("offline-run-*/*.wandb")
        text = record.read_bytes()
        assert RunRecord(run_group="dpo").SerializeToString() in text
        assert b"beta" in text
