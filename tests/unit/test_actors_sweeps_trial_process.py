"""Processes of trials get a share of the machine, fail and end, and never outlive the sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from actors.sweeps.trial_process import MachineShare, TrialProcess, wait_for_all
from rlhf.process.stopping import StopRequest

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
