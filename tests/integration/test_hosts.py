"""A run on a cluster of three hosts, with roles connected only by the network, equals a run on one machine.

Hosts are network namespaces (tests/hosts.py) with real nodes of Ray, on one disk and one clock. Gloo between the
policy's ranks, and from these ranks to vLLM, is real. In float32 the two runs differ only in addresses. The trials of a
sweep share hosts too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest

from rlhf.cli import main
from tests.hosts import POOLS, THREE_BUNDLES, several_hosts, start_ray
from tests.integration.recipes import ONLINE, merge, rlhf, rows, without_clocks, write_config

pytestmark = pytest.mark.multinode


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hosts_train_as_one_does(ray_local: None, tmp_path: Path) -> None:
    base = merge(ONLINE, THREE_BUNDLES)
    one, three = tmp_path / "one", tmp_path / "three"
    configs = [
        write_config(tmp_path / f"{run.name}.yaml", {"run": {"name": run.name, "dir": str(tmp_path)}}, base)
        for run in (one, three)
    ]
    assert main(["train", str(configs[0]), "--quiet"]) == 0
    with several_hosts(3) as hosts:
        address = start_ray(hosts, cpus=[1, 1, 1], labels=["pool=serve", "pool=train", "pool=train"])
        pools = [f"cluster.roles.{role}.node_labels={{pool: {pool}}}" for role, pool in POOLS.items()]
        look = [*rlhf(), "doctor", "--cluster", configs[1], "--address", address]
        looked = hosts[0].run(look, {"COLUMNS": "200"}, timeout_s=120.0)
        command = [*rlhf(), "train", configs[1], "--quiet", f"cluster.address={address}", *pools]
        said = hosts[0].run(command, timeout_s=280.0)
    assert "this cluster can train" in looked
    for what in ("all 3", "eth0", "versions", "our code", "run.dir", "the slowest of 3"):
        assert what in looked, looked
    (placed,) = [line for line in said.splitlines() if "placed: " in line]
    on = dict(part.split(" on ") for part in placed.partition("placed: ")[2].split("; "))
    assert sorted(on["policy"].split(", ")) == ["10.77.0.2", "10.77.0.3"], placed
    assert on["rollout"] == on["reward"] == "10.77.0.1", placed
    assert "each sync sends the weights by gloo" in said
    measured = {key.split("/")[1] for key in rows(three)[-1] if key.startswith("system/")}
    assert measured == {"10.77.0.1", "10.77.0.2", "10.77.0.3"}
    found, expected = without_clocks(rows(three)), without_clocks(rows(one))
    assert len(found) == 3
    for there, here in zip(found, expected, strict=True):
        assert there == pytest.approx(here, rel=1e-5, abs=1e-5)


JOIN = """
import datetime, os, sys, torch, torch.distributed as dist
from rlhf.engine.distributed import meet_through
rank, limit = int(sys.argv[1]), datetime.timedelta(seconds=10)
meet_through("10.77.0.1")  # without it neither gets to the other
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:7000", rank=rank, world_size=2, timeout=limit)
total = torch.ones(3)
dist.all_reduce(total)
print("total", total.sum().item(), os.environ.get("GLOO_SOCKET_IFNAME"))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_a_sweep_share_the_hosts(tmp_path: Path) -> None:
    with several_hosts(2) as hosts:
        address = start_ray(hosts, cpus=[1, 2])
        short = ["train.steps=20", "train.checkpoint_every=20", "sweep.method.trials=4"]
        config = Path(__file__).parents[2] / "configs/sweep_tiny.yaml"
        sweep = [*rlhf(), "sweep", config, "--quiet", f"cluster.address={address}", f"sweep.dir={tmp_path}", *short]
        hosts[0].run(sweep, timeout_s=400.0)
    events = [json.loads(line) for line in (tmp_path / "tiny/trials.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events[:4]] == ["trial", "trial", "trial", "end"]  # one per CPU
    ends = [event["state"] for event in events if event["event"] == "end"]
    assert ends == ["finished"] * 4


def test_ranks_meet_by_the_interface_that_leads_to_the_others() -> None:
    """Each host's name stands for an address of a second interface without a route: gloo itself takes it."""
    options: dict[str, Any] = {"stdout": PIPE, "stderr": STDOUT}
    with several_hosts(2) as hosts:
        for host in hosts:
            host.add_interface("aaa0", "192.168.50.1")
        commands = [[sys.executable, "-c", JOIN, str(rank)] for rank in range(2)]
        ranks = [host.start(command, **options) for host, command in zip(hosts, commands, strict=True)]
        said = [rank.communicate(timeout=60.0)[0] for rank in ranks]
        assert all("total 6.0 eth0" in text for text in said), said
