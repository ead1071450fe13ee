"""Real trials on one base model survive a kill of the server and a kill of the sweep."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

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
        "train": {"steps": 6, "lr": 5e-3},
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


def test_trials_of_one_base_survive_kills_of_the_server_and_of_the_sweep(tmp_path: Path) -> None:
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

    for trial in ("trial-000", "trial-001"):
        written = rows(folder / "trials" / trial)
        assert [row["step"] for row in written] == list(range(7))
        assert written[-1]["eval/heldout/score"] > written[0]["eval/heldout/score"] + 0.3
