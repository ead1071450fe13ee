"""The processes of trials: their share of the machine, how they fail and end, and that none outlives its sweep."""

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
SWEEP = """
import sys, time
from pathlib import Path
from actors.sweeps.trial_process import MachineShare, TrialProcess
print(TrialProcess(MachineShare(), Path("/dev/null")).process.pid, flush=True)
time.sleep(60)
"""


def code_of(process: TrialProcess) -> int:
    """Its exit code, within a minute."""
    until = time.monotonic() + DEADLINE_S
    while (code := process.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    return code


def test_a_trial_says_in_its_log_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = TrialProcess(MachineShare(), log)
    process.begin(tmp_path / "none.yaml", log, until=3, keep=False)
    assert not process.is_idle
    assert code_of(process) == 2
    assert f"rlhf: error: {tmp_path}/none.yaml: no such config file" in log.read_text()


def test_a_warm_process_ends_with_a_trial_that_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = TrialProcess(MachineShare(), log)
    assert process.is_idle
    process.begin(tmp_path / "none.yaml", log, until=None, keep=True)
    assert code_of(process) == 2
    assert not process.is_idle  # nor does it take one more while it ends
    assert process.process.returncode == 2
    assert "no such config file" in log.read_text()


def test_a_process_has_its_share_and_ends_when_it_is_told(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    log = tmp_path / "log"
    kept = TrialProcess(MachineShare(cores=(core,), gpus=("1", "3")), log)
    interrupted = TrialProcess(MachineShare(), log)
    started = psutil.Process(kept.process.pid)
    assert started.cpu_affinity() == [core]
    assert started.cmdline()[-1] == str(tmp_path)  # ps tells the sweep of a process
    assert started.environ()["CUDA_VISIBLE_DEVICES"] == "1,3"
    interrupted.interrupt()
    wait_for_all([interrupted], StopRequest())
    assert interrupted.process.returncode == -signal.SIGTERM
    kept.dismiss()
    wait_for_all([kept], StopRequest())
    assert kept.process.returncode == 0


def test_a_process_ends_with_the_sweep_however_that_ends() -> None:
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    trial = psutil.Process(int(sweep.stdout.readline()))
    sweep.kill()
    sweep.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs([trial], timeout=DEADLINE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupt_kills_what_does_not_end(tmp_path: Path) -> None:
    request, stuck = StopRequest(), TrialProcess(MachineShare(), tmp_path / "log", grace_s=600.0)
    psutil.Process(stuck.process.pid).suspend()
    request.interrupted.set()
    stuck.interrupt()
    wait_for_all([stuck], request)
    assert stuck.process.poll() is not None
