"""A run that loses a host without a replacement ends in time with an error that names the host. The continued run
repeats the unbroken run.

One host dies with all processes. A second host is disconnected, and its processes run on. Both hosts are replaced. See
tests/hosts.py.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from tests.hosts import BIN, QUICK_HEALTH, THREE_BUNDLES, Host, several_hosts, start_node, start_ray
from tests.integration.faults import MANY, steps_done
from tests.integration.recipes import ONLINE, merge, rlhf, rows, without_clocks, write_config

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(900)]

NAMED_WITHIN_S = 45.0  # on a busy machine; call_timeout_s is 120
CHANGES: Mapping[str, Any] = {
    "train": {"steps": MANY, "checkpoint_every": 1},
    "eval": {"every": MANY},
    "cluster": {"restarts": {"engine": 0, "gang": 0, "worker": 0}},  # the first loss ends the run
}


def test_lost_hosts_are_named_and_replaced(ray_local: None, tmp_path: Path) -> None:
    run = tmp_path / "three"
    base = merge(merge(ONLINE, THREE_BUNDLES), CHANGES)
    config = write_config(tmp_path / "three.yaml", {"run": {"name": "three", "dir": str(tmp_path)}}, base)
    with several_hosts(4) as hosts:
        head, first, second, spare = hosts
        address = start_ray(hosts[:3], cpus=[1, 1, 1], env=QUICK_HEALTH)

        def train(*arguments: str) -> subprocess.Popen[str]:
            command = [*rlhf(), "train", config, "--quiet", f"cluster.address={address}", *arguments]
            return head.start(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

        said = lost_at(train(), run, 1, second.kill)
        assert names(said, second, "no Ray runs on node 10.77.0.3 any more"), said
        start_node(second, f"--address={address}", "--num-cpus=1", env=QUICK_HEALTH)
        said = lost_at(train("--resume", "auto"), run, steps_done(run) + 1, first.cut)
        assert names(said, first, "node 10.77.0.2 cannot be reached"), said
        assert first.pids()  # the host's processes run on

        start_node(spare, f"--address={address}", "--num-cpus=1", env=QUICK_HEALTH)
        steps = steps_done(run) + 1
        done = train("--resume", "auto", f"train.steps={steps}")
        _, said = done.communicate(timeout=240.0)
        assert done.returncode == 0, said
        before = contents(run)
        first.cut(is_cut=False)
        time.sleep(3.0)
        assert contents(run) == before
    assert main(["train", str(config), "--quiet", "run.name=one", f"train.steps={steps}"]) == 0
    for there, here in zip(without_clocks(rows(run)), without_clocks(rows(tmp_path / "one")), strict=True):
        assert there == pytest.approx(here, rel=1e-5, abs=1e-5)


def lost_at(process: subprocess.Popen[str], run: Path, steps: int, lose: Callable[[], None]) -> str:
    """Return the output of a run that ends in time because of a loss."""
    until = time.monotonic() + 200.0
    while steps_done(run) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    lose()
    try:
        _, said = process.communicate(timeout=NAMED_WITHIN_S)
    finally:
        process.kill()
    assert process.returncode == 1, said
    return said


def names(said: str, host: Host, what: str) -> bool:
    """Return whether the last words name stage, role, node and fate of the node, and how to go on."""
    (paragraph,) = said.split("rlhf: error: ")[1:]
    role, node = r"(policy|critic|rollout|reward|reference) rank \d", re.escape(host.address)
    itself = rf"\w[\w ]*: {role} died with its node \(process \d+ on {node}\): {re.escape(what)}\."
    another = rf"\w[\w ]*: {role} .* Lost with its node: {role}.* \({re.escape(what)}\)\."
    found = re.match(itself, paragraph) or re.match(another, paragraph, re.DOTALL)
    return found is not None and "--resume auto" in paragraph


def contents(run: Path) -> dict[str, str]:
    """A hash of every file."""
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}


DRAIN = """
import asyncio, subprocess, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from actors.cluster.actor_locations import draining_node, own_location, remember

class Worker:
    def where(self):
        return own_location(self, 0.0)

head, command = sys.argv[1:]
ray.init(address=head)
(node,) = [one["NodeID"] for one in ray.nodes() if one["NodeManagerAddress"] == "10.77.0.2"]
there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
worker = ray.remote(Worker).options(num_cpus=1, scheduling_strategy=there).remote()
remember("policy", {0: ray.get(worker.where.remote(), timeout=60)})
assert asyncio.run(draining_node(lambda: {node})) is None
reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=100"]
subprocess.run([command, "drain-node", f"--address={head}", f"--node-id={node}", *reason], check=True)
assert asyncio.run(draining_node(lambda: {"another"})) is None
print("leaving", *asyncio.run(draining_node(lambda: {node})))
"""


def test_a_node_that_ray_drains_is_known_to_leave() -> None:
    with several_hosts(2) as hosts:
        address = start_ray(hosts, cpus=[1, 1])
        said = hosts[0].run([sys.executable, "-c", DRAIN, address, BIN / "ray"])
    (found,) = [line.split() for line in said.splitlines() if line.startswith("leaving")]
    assert found[1] == "10.77.0.2"
    assert 0.0 < float(found[2]) - time.time() <= 100.0
