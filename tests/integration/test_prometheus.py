"""A Ray of two nodes exports a run's metrics at a node's port, and the load of the nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, json, sys, time, urllib.request
from pathlib import Path
from types import SimpleNamespace

import ray
from ray.cluster_utils import Cluster

from actors.cluster.node_metrics import Nodes
from actors.cluster.prometheus import PrometheusBackend
from tests.fixtures.tracking import exercise

settings = {"num_cpus": 1, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 200}}
cluster = Cluster(initialize_head=True, connect=True, head_node_args=settings)
cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
nodes = Nodes(SimpleNamespace(nodes=lambda: {node["NodeID"] for node in ray.nodes()}))

async def use(limit_s):
    until = time.monotonic() + limit_s
    while True:
        time.sleep(0.2)
        found = await nodes.use()
        if len(found) >= 4 or time.monotonic() > until:
            return {key: one.result() for key, one in found.items()}

exercise(Path(sys.argv[1]), PrometheusBackend("pipe/grpo"))
node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
until, lines = time.monotonic() + 30, []
while len(lines) < 4 and time.monotonic() < until:
    time.sleep(0.1)
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_rlhf_")]
busy = asyncio.run(use(30))
nodes.end()
print(json.dumps({"lines": lines, "busy": busy}))
"""


def test_metrics_reach_the_export_port_and_nodes_say_how_busy_they_are(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    values = {}
    for line in told["lines"]:
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        assert 'run="pipe/grpo"' in labels
        values[name, 'name="correct"' in labels] = float(value)
    assert values == {
        ("ray_rlhf_step", False): 2.0,
        ("ray_rlhf_update_lr", False): 0.125,
        ("ray_rlhf_rewards_mean", True): 0.25,
        ("ray_rlhf_rollouts_tokens_total", False): 12.0,  # 7 + 5
    }
    busy = told["busy"]
    assert {key.split("/")[2] for key in busy} == {"cpu_fraction", "memory_gib"}
    assert len({key.split("/")[1] for key in busy}) == 2
    assert all(value >= 0.0 for value in busy.values())
