"""`rlhf train` with a local Ray survives signals and stopped daemons of Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from tests.integration.faults import GRPO, SFT, await_steps, checkpoints, end, steps_done, write_run
from tests.integration.recipes import start

ONE_RANK = {"cluster": {"roles": None, "call_timeout_s": 20.0}}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def running(folder: Path, name: str, *arguments: str, steps: int = 3) -> tuple[Path, Popen[str]]:
    """Start a run and wait for some steps."""
    run = folder / name
    process = start(write_run(folder, name, SFT, ONE_RANK), *arguments, without=["RAY_AUTH_MODE"])
    await_steps({run: process}, {run: steps})
    return run, process


def said(run: Path) -> str:
    return run.with_suffix(".log").read_text(encoding="utf-8")


def daemon(process: Popen[str], name: str) -> psutil.Process:
    (found,) = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == name]
    return found


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_daemon_that_stands_still_does_not_hold_a_driver_that_is_done(tmp_path: Path, name: str) -> None:
    run, process = running(tmp_path, "done", "train.steps=60", "--quiet")
    stopped = daemon(process, name)
    stopped.suspend()
    assert process.wait(timeout=120) == 0, said(run)
    assert (run / "final").exists()
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE


def test_a_second_signal_ends_a_run_whose_ray_stands_still(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run, process = running(tmp_path, "held", "train.checkpoint_every=2", "--quiet", steps=5)
    request.addfinalizer(process.kill)
    for name in ("raylet", "gcs_server"):
        daemon(process, name).suspend()
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    end(process, signal.SIGINT, 130)
    assert "continues after step" in said(run)


def test_a_signal_keeps_what_is_done(tmp_path: Path) -> None:
    run, process = running(tmp_path, "kept", "train.checkpoint_every=100000", "--quiet")
    end(process, signal.SIGHUP, 75)
    step = steps_done(run)
    assert checkpoints(run) == [f"step_{step:06d}"]
    assert f"a checkpoint of step {step} is written; the run continues after step {step}. Continue with" in said(run)


def test_sigterm_while_ray_starts_is_preempted(tmp_path: Path) -> None:
    run = tmp_path / "starts"
    process = start(write_run(tmp_path, run.name, SFT, ONE_RANK), "--quiet", without=["RAY_AUTH_MODE"])
    while "starting Ray on this machine" not in said(run):  # until the time limit of the test
        time.sleep(0.05)
    time.sleep(1.5)
    end(process, signal.SIGTERM, 75)
    assert "rlhf: preempted: the work in progress was given up; there is no checkpoint, so the run starts" in said(run)


NOTEBOOK = """
import asyncio, sys
import yaml

def length(prompt, response):
    return float(len(response) % 3)

async def cells():
    import rlhf
    values = yaml.safe_load(open(sys.argv[1]))
    values["rewards"] = {"mine": {"function": length}}
    for name in ("first", "second"):
        values["run"]["name"] = name
        print(rlhf.train(values, ["train.steps=1"]))

if __name__ == "__main__":
    asyncio.run(cells())
"""


def test_two_runs_in_cells_of_a_notebook_under_an_ascii_locale(tmp_path: Path) -> None:
    """Each run has a separate Ray. A function of the notebook's file is the reward."""
    config = write_run(tmp_path, "first", GRPO, {"cluster": {"call_timeout_s": 60.0}})
    (tmp_path / "notebook.py").write_text(NOTEBOOK, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | ascii_only
    command = [sys.executable, str(tmp_path / "notebook.py"), str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path}/first\n{tmp_path}/second\n"
    assert all((tmp_path / name / "final").exists() for name in ("first", "second"))
