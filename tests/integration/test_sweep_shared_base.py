"""Real trials on one base model: the numbers of separate runs, over a kill of the server and a kill of the sweep."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import rlhf
from rlhf.config.files.load import load
from tests.integration.recipes import ONLINE, merge, rows
from tests.integration.test_sweep import results, start, sweep_file, trial_processes, wait_until, wrote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ADAPTED = merge(
    ONLINE,
    {
        "run": {"name": "adapted"},
        "policy": {"lora": {"rank": 4}},
        "algorithm": {"name": "grpo"},
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {"steps": 6},
        "cluster": {"start_timeout_s": 500.0, "call_timeout_s": 900.0},  # the server is away for a minute or more
    },
)
SHARED = {"config": ADAPTED, "parameters": {"policy.lora.rank": {"values": [2, 4]}}, "metric": "eval/heldout/score"}


def server_of(folder: Path) -> psutil.Process:
    """Return the running process of the server."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "tinker" in words and str(folder / "server.yaml") in words:
            return process
    raise AssertionError("no server runs")


def test_trials_of_one_base_give_the_numbers_of_separate_runs(tmp_path: Path) -> None:
    file, folder = sweep_file(tmp_path, "shared", **SHARED, shared_base=True), tmp_path / "shared"
    sweep = start(file)
    wait_until(lambda: wrote(folder, 0, 1) and wrote(folder, 1, 1), sweep, timeout_s=600)
    server_of(folder).kill()
    wait_until(lambda: wrote(folder, 0, 3) and wrote(folder, 1, 3), sweep, timeout_s=400)
    running = [*trial_processes(folder), server_of(folder), *server_of(folder).children(recursive=True)]
    os.kill(sweep.pid, signal.SIGKILL)
    for process in running:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(running, timeout=30)
    sweep.wait(timeout=30)

    again = start(file, "--resume", "auto")
    assert again.wait(timeout=600) == 0, file.with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    assert [row["state"] for row in results(folder)] == ["finished", "finished"]
    with pytest.raises(AssertionError, match="no server runs"):
        server_of(folder)
    (best,) = load(folder / "best.yaml").runs.values()
    assert best.policy.tinker is None

    rlhf.sweep(sweep_file(tmp_path, "apart", **SHARED, concurrency=1), quiet=True)
    for trial in ("trial-000", "trial-001"):
        ours, theirs = (rows(of / "trials" / trial) for of in (folder, tmp_path / "apart"))
        assert [row["step"] for row in ours] == list(range(7))
        for name in ("rewards/score/mean", "update/loss/mean", "update/grad_norm", "eval/heldout/score"):
            expected = [row.get(name) for row in theirs]
            assert [row.get(name) for row in ours] == pytest.approx(expected, abs=1e-5), name
