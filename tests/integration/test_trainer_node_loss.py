"""A host with ranks of policy and critic is lost: successors on another host continue from copies of snapshots.

Hosts are network namespaces (tests/hosts.py). No checkpoint is written before the end, so only the copies in the memory
of another host hold the state. The run ends with the metrics and the weights of the unbroken run, bit for bit. Without
another host the run ends with a checkpoint of the same state, and continues from there in the same way.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.cluster.memory_folders import MemoryFolder, folders_of_user
from rlhf.cli import main
from tests.hosts import POOLS, QUICK_HEALTH, THREE_BUNDLES, several_hosts, start_ray
from tests.integration.faults import steps_done
from tests.integration.recipes import ONLINE, merge, rlhf, rows, weights, without_clocks, write_config

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(900)]

APART = [f"cluster.roles.{role}.node_labels={{pool: {pool}}}" for role, pool in POOLS.items()]
CHANGES: Mapping[str, Any] = {"train": {"steps": 4, "checkpoint_every": 100}, "eval": {"every": 4}}
# The processes of a killed host refuse connections at once. A busy machine may answer late.
HEALTH = {**QUICK_HEALTH, "RAY_health_check_timeout_ms": "10000"}
SOON: Mapping[str, Any] = {"cluster": {"start_timeout_s": 60.0}}


def lose_a_trainers_host(config: Path, run: Path, *, num_trainers: int, rank: int) -> tuple[int, str]:
    """Kill the host of a policy rank after the first step. Returns the exit code and the run's output. The hosts share
    /dev/shm, so the next run removes the lost host's leftovers."""
    with several_hosts(1 + num_trainers) as hosts:
        labels = ["pool=serve", *["pool=train"] * num_trainers]
        address = start_ray(hosts, cpus=[1] * len(hosts), labels=labels, env=HEALTH)
        command = [*rlhf(), "train", config, "--quiet", f"cluster.address={address}", *APART]
        process = hosts[0].start(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 240.0
            while steps_done(run) < 1:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < until
                time.sleep(0.02)
            places = {row["who"]: row["node"] for row in json.loads((run / "processes.json").read_text())}
            (lost,) = [host for host in hosts if host.address == places[f"policy rank {rank}"]]
            lost.kill()
            _, said = process.communicate(timeout=240.0)
        finally:
            process.kill()
    MemoryFolder(folders_of_user() / f"next-{process.pid}").remove()
    assert not [path for path in folders_of_user().iterdir() if f"-{process.pid}-" in path.name]
    return process.returncode, said


@pytest.mark.parametrize("rank", [0, 1])  # the reference is on the host of rank 0
def test_the_loss_of_a_trainers_host_changes_no_bit(ray_local: None, tmp_path: Path, rank: int) -> None:
    base = merge(merge(ONLINE, THREE_BUNDLES), CHANGES)
    one, lost = tmp_path / "one", tmp_path / "lost"
    configs = [
        write_config(tmp_path / f"{run.name}.yaml", {"run": {"name": run.name, "dir": str(tmp_path)}}, base)
        for run in (one, lost)
    ]
    code, said = lose_a_trainers_host(configs[1], lost, num_trainers=3, rank=rank)
    assert code == 0, said
    assert main(["train", str(configs[0]), "--quiet"]) == 0
    assert sum(row["recovery/policy/total"] + row["recovery/critic/total"] for row in rows(lost)) >= 1
    assert without_clocks(rows(lost)) == without_clocks(rows(one))
    assert weights(lost) == weights(one)


def test_without_another_host_no_finished_step_is_lost(ray_local: None, tmp_path: Path) -> None:
    """No checkpoint is written before the loss. The later checkpoint is made of snapshots and copies."""
    base = merge(merge(merge(ONLINE, THREE_BUNDLES), CHANGES), SOON)
    one, lost = tmp_path / "one", tmp_path / "lost"
    configs = [
        write_config(tmp_path / f"{run.name}.yaml", {"run": {"name": run.name, "dir": str(tmp_path)}}, base)
        for run in (one, lost)
    ]
    code, said = lose_a_trainers_host(configs[1], lost, num_trainers=2, rank=0)
    assert code == 75, said
    assert "No other node took its place within 60 s (cluster.start_timeout_s); the run continues after step" in said
    errors = [json.loads(line) for line in (lost / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert errors[-1]["kind"] == "died"
    (checkpoint,) = (lost / "checkpoints").glob("step_*")
    assert checkpoint.name == f"step_{steps_done(lost):06d}"
    assert main(["doctor", str(lost)]) == 0
    patient = ["--quiet", "cluster.start_timeout_s=200"]
    assert main(["train", str(configs[1]), "--resume", "auto", *patient]) == 0
    assert main(["train", str(configs[0]), *patient]) == 0
    assert without_clocks(rows(lost)) == without_clocks(rows(one))
    assert weights(lost) == weights(one)
