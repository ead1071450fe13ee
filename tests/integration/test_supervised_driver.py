"""`rlhf train --supervise` with real Ray, vLLM and DeepSpeed: the driver is killed twice, and nothing else is lost."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.tracking.sinks.tracker import read_metrics
from tests.integration.recipes import ONLINE, merge, rows, start, train, without_clocks, write_config

SMALL: Mapping[str, Any] = {
    "algorithm": {"name": "grpo"},
    "data": {"eval": None},
    "eval": None,
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "rollouts": {"prompts_per_step": 4},
    "train": {"steps": 6, "lr": 1e-5},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_twice_ends_with_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    base = merge(ONLINE, SMALL)
    names = ("unbroken", "killed")
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", {"run": {"name": name, "dir": str(tmp_path)}}, base)
        for name in names
    }
    train(configs["unbroken"], "--quiet")
    run = tmp_path / "killed"
    parent = start(configs["killed"], "--quiet", "--supervise")
    try:
        drivers = [kill_driver(run, after=after) for after in (1, 3)]
        assert parent.wait(timeout=280) == 0
    finally:
        parent.kill()
    log = configs["killed"].with_suffix(".log").read_text(encoding="utf-8")
    assert len(set(drivers)) == 2, log
    assert log.count("The driver was killed by SIGKILL after step") == 2, log
    found = rows(run)
    assert without_clocks(found) == without_clocks(rows(tmp_path / "unbroken"))
    assert sum(row["recovery/controller/total"] for row in found) == 2
    assert sum(row["time/recovery_s"] for row in found) > 0.0
    errors = [json.loads(line) for line in (run / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(error["stage"], error["kind"]) for error in errors] == [("driver", "died")] * 2
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (tmp_path / "unbroken", run)]
    assert weights[0] == weights[1]


def kill_driver(run: Path, *, after: int) -> int:
    """Kill the run's driver once it has done more than so many steps. Return its process id."""
    until = time.monotonic() + 240.0
    while len(read_metrics(run)) <= after:
        assert time.monotonic() < until
        time.sleep(0.05)
    driver = int((run / ".lock").read_text(encoding="utf-8"))
    psutil.Process(driver).send_signal(signal.SIGKILL)
    return driver
