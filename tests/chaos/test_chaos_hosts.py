"""Hosts of engines are lost, come back, join and are drained during a run, and the run continues.

Hosts are network namespaces (tests/hosts.py). A host loses all its processes at once, or its network. With
weights by broadcast, a run would end with the loss of its only engine.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf.cli import main
from rlhf.tracking.sinks.tracker import read_metrics
from tests.chaos.faults import TimelineTail, wait_until
from tests.chaos.survival import (
    BASE,
    COMMAND,
    LIMIT_S,
    MODES,
    REWARD,
    contradictions,
    counted,
    groups_left,
    noting_groups,
    steps_done,
    unrecorded,
    wait_for_end,
)
from tests.hosts import BIN, QUICK_HEALTH, Host, several_hosts, start_node, start_ray
from tests.integration.faults import MANY
from tests.integration.recipes import merge, write_config

pytestmark = [pytest.mark.multinode, pytest.mark.chaos, pytest.mark.timeout(900)]

APART: Mapping[str, Any] = {
    "cluster": {
        "object_store_gib": None,
        "roles": {
            "policy": {"node_labels": {"pool": "train"}},
            "rollout": {"engines": 2, "cpus": 1.0, "node_labels": {"pool": "serve"}},
        },
    }
}


STEPS = {"in turns": 30, "in flight": 120}  # in flight, training must go on until the successor works
TOGETHER: Mapping[str, Any] = {
    "train": {"steps": 12, "epochs_per_batch": 20},  # updates of some seconds, in which the host is lost
    "cluster": {
        "object_store_gib": None,
        "roles": {
            "policy": {"cpus": 2.0, "node_labels": {"pool": "both"}},  # a host has room for one rank
            "rollout": {"engines": 2, "cpus": 1.0, "node_labels": {"pool": "both"}},
        },
    },
}


def lose_a_host(
    folder: Path,
    tree: Mapping[str, Any],
    lose: Callable[[Sequence[Host], Callable[[str], None]], None],
    *,
    pools: tuple[str, str],
    cpus: int,
) -> Path:
    """Run on three hosts, lose a host of the second pool after a step, and add a spare host. Return the finished run.
    `lose` gets the hosts, and a function that waits for the next span of a name."""
    run, config = folder / "run", folder / "run.yaml"
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    write_config(config, {"run": {"name": "run", "dir": str(folder), "seed": 3}}, tree)
    with several_hosts(4) as hosts, (folder / "run.log").open("w") as log:
        labels = [f"pool={pools[0]}", *[f"pool={pools[1]}"] * 2]
        address = start_ray(hosts[:3], cpus=[1, cpus, cpus], labels=labels, env=QUICK_HEALTH)
        command = [*COMMAND, "train", config, "--quiet", f"cluster.address={address}"]
        process = hosts[0].start(command, noting_groups(config), stdout=log, stderr=subprocess.STDOUT)
        tail = TimelineTail(run / "timeline.json")

        def wait_for(name: str) -> None:
            count = tail.count(name)
            assert wait_until(lambda: tail.count(name) > count, lambda: process.poll() is not None, limit_s=LIMIT_S)

        try:
            wait_for("step")
            lose(hosts, wait_for)
            join(hosts[3], address, cpus=cpus, pool=pools[1])
            assert wait_for_end(process, LIMIT_S) == 0, (folder / "run.log").read_text()[-4000:]
        finally:
            process.kill()
        assert not contradictions(run, None)
        assert not groups_left(config)
    return run


@pytest.mark.parametrize("how", ["kill", "cut"])
@pytest.mark.parametrize("mode", ["in turns", "in flight"])
def test_a_run_survives_the_loss_of_an_engines_host(
    mode: Literal["in turns", "in flight"], how: Literal["kill", "cut"], tmp_path: Path
) -> None:
    tree = merge(merge(merge(BASE, MODES[mode].changes), APART), {"train": {"steps": STEPS[mode]}})
    lose = {"kill": lambda hosts, _: hosts[2].kill(), "cut": lambda hosts, _: hosts[2].cut()}[how]
    assert not unrecorded(lose_a_host(tmp_path, tree, lose, pools=("train", "serve"), cpus=1), "rollout")


def test_a_run_survives_the_loss_of_a_host_with_a_rank_and_an_engine_that_nobody_has_missed(tmp_path: Path) -> None:
    def lose(hosts: Sequence[Host], wait_for: Callable[[str], None]) -> None:
        listed = json.loads((tmp_path / "run" / "processes.json").read_text())
        places = {row["who"]: row["node"] for row in listed}
        assert sorted(places[f"rollout rank {n}"] for n in (0, 1)) == [host.address for host in hosts[1:3]]
        (lost,) = [host for host in hosts if host.address == places["policy rank 1"]]
        wait_for("experience")
        lost.kill()

    run = lose_a_host(tmp_path, merge(BASE, TOGETHER), lose, pools=("drives", "both"), cpus=3)
    assert counted(run, "policy") + counted(run, "critic") == 1.0
    assert counted(run, "rollout") == 1.0


DRAIN = """
import subprocess, sys
import ray

head, address, command = sys.argv[1:]
ray.init(address=head)
(node,) = [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["NodeManagerAddress"] == address]
reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=600"]
subprocess.run([command, "drain-node", f"--address={head}", f"--node-id={node}", *reason], check=True)
"""


ELASTIC: Mapping[str, Any] = {
    "train": {"steps": MANY, "checkpoint_every": 50},
    "eval": {"every": MANY},
    "algorithm": {"name": "grpo", "critic_lr": None, "kl": {"coef": 0.0, "estimator": None, "place": None}},
    "cluster": {
        "roles": {"policy": {"workers": 1}, "critic": None, "reference": None, "reward": {"colocate_with": "policy"}}
    },
}


@contextmanager
def elastic_run(
    folder: Path, hosts: Sequence[Host], *, engines: Mapping[str, int], starts_on: int
) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Yield the Ray of a run in flight, with trainers on the first host, and a wait for a number of engines elsewhere.

    After the block the run must obey a signal and leave no placement group, and the run's ledger must be right.
    `starts_on`: the number of hosts present at the start.
    """
    run, head = folder / "run", hosts[0]
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    tree = merge(merge(merge(BASE, MODES["in flight"].changes), APART), ELASTIC)
    tree["cluster"]["roles"]["rollout"]["engines"] = engines
    config = write_config(folder / "run.yaml", {"run": {"name": "run", "dir": str(folder), "seed": 3}}, tree)
    labels = ["pool=train", *["pool=serve"] * (starts_on - 1)]
    address = start_ray(hosts[:starts_on], cpus=[1] * starts_on, labels=labels, env=QUICK_HEALTH)
    with (folder / "run.log").open("w") as log:
        command = [*COMMAND, "train", config, "--quiet", f"cluster.address={address}"]
        process = head.start(command, noting_groups(config), stdout=log, stderr=subprocess.STDOUT)

    def wait_for(count: int) -> None:
        def is_so() -> bool:
            return steps_done(run) > 0 and read_metrics(run)[-1]["rollouts/engines"] == count

        reached = wait_until(is_so, lambda: process.poll() is not None, limit_s=LIMIT_S)
        assert reached, (folder / "run.log").read_text()[-4000:]

    try:
        yield address, wait_for
        process.send_signal(signal.SIGTERM)
        assert wait_for_end(process, LIMIT_S) == 75, (folder / "run.log").read_text()[-4000:]
    finally:
        process.kill()
    assert main(["doctor", str(run)]) == 0
    assert not groups_left(config)


def join(host: Host, address: str, *, cpus: int = 1, pool: str = "serve") -> None:
    start_node(host, f"--address={address}", f"--num-cpus={cpus}", f"--labels=pool={pool}", env=QUICK_HEALTH)


def test_training_goes_on_while_hosts_of_engines_are_lost_come_back_and_join(tmp_path: Path) -> None:
    with several_hosts(4) as hosts:
        _, _, lost, spare = hosts
        with elastic_run(tmp_path, hosts, engines={"min": 2, "max": 3}, starts_on=3) as (address, wait_for):
            wait_for(2)
            lost.cut()
            wait_for(1)
            lost.cut(is_cut=False)
            lost.kill()
            join(lost, address)
            wait_for(2)
            join(spare, address)
            wait_for(3)


def test_an_engine_leaves_a_host_that_is_drained(tmp_path: Path) -> None:
    with several_hosts(3) as hosts:
        head, _, drained = hosts
        with elastic_run(tmp_path, hosts, engines={"min": 1, "max": 2}, starts_on=3) as (address, wait_for):
            wait_for(2)
            head.run([sys.executable, "-c", DRAIN, address, drained.address, BIN / "ray"])
            wait_for(1)
    (errors,) = [path.read_text() for path in (tmp_path / "run").glob("errors.jsonl")] or [""]
    assert "rollout" not in errors, "an engine that leaves is not lost"
