"""cluster/slurm/train.sbatch in a real Slurm of three nodes: the time limit comes, the run goes on where it was.

Nodes are network namespaces (tests/hosts.py, tests/slurm.py); Slurm, Ray and gloo between the ranks are real.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.hosts import several_hosts
from tests.integration.recipes import ONLINE, merge, rows, without_clocks, write_config
from tests.slurm import slurm

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster/slurm/train.sbatch"
OVER_TWO_NODES: Mapping[str, Any] = {  # each node has one CPU
    "algorithm": {"name": "sft"},
    "data": {"train": {"split": "sft"}, "eval": None, "max_prompt_tokens": None},
    "eval": None,
    "rollouts": None,
    "train": {"steps": 1_000_000, "checkpoint_every": 1_000_000, "sequences_per_update": 8},
    "cluster": {"object_store_gib": None, "roles": {"policy": {"workers": 2, "threads": 1}}},
}
MORE = 5


@pytest.fixture
def console(tmp_path: Path) -> Path:
    """A folder for PATH whose `rlhf` is the code of these tests, also where another checkout is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "rlhf").write_text(f'#!/bin/sh\nexec {sys.executable} -m rlhf.cli "$@"\n', encoding="utf-8")
    (folder / "rlhf").chmod(0o755)
    return folder


def test_a_time_limit_puts_the_run_back_and_it_goes_on(
    ray_local: None, console: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    base = merge(ONLINE, OVER_TWO_NODES)
    config = write_config(tmp_path / "run.yaml", {"run": {"name": "run", "dir": str(tmp_path)}}, base)
    monkeypatch.setenv("PATH", os.pathsep.join([str(console), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_AUTH_MODE")

    def steps() -> int:
        return len(rows(run)) if (run / "metrics.jsonl").exists() else 0

    def said(words: str) -> bool:
        return log.exists() and words in log.read_text(encoding="utf-8", errors="replace")

    with several_hosts(3) as hosts, slurm(hosts, tmp_path / "slurm") as cluster:
        limits = ["--nodes=3", "--time=3", "--signal=B:TERM@60", f"--output={log}"]
        number = cluster.run("sbatch", "--parsable", *limits, SCRIPT, config, "--quiet").strip()
        try:
            cluster.until(lambda: said("back into the queue"), within_s=200.0, what="the time limit's signal")
            before = steps()
            assert before > 0
            assert said(f"preempted: a checkpoint of step {before} is written")
            cluster.until(lambda: steps() >= before + MORE, within_s=150.0, what=f"steps after {before}")
            assert cluster.job(number)["Restarts"] == "1"
            cluster.run("scancel", number)
            cluster.until(lambda: cluster.job(number)["JobState"] == "CANCELLED", within_s=90.0, what="its end")
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{log.read_text(errors='replace')[-4000:] if log.exists() else ''}"
            ) from error
    found = without_clocks(rows(run))[: before + MORE]
    assert [row["step"] for row in found] == list(range(1, before + MORE + 1))
    unbroken = [f"train.steps={before + MORE}", "run.name=unbroken", "--quiet"]
    assert main(["train", str(config), *unbroken]) == 0
    assert found == without_clocks(rows(tmp_path / "unbroken"))
