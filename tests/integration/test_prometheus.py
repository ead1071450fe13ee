"""Ray exports a run's metrics at a port of the node, and an actor measures the node's load."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from actors.cluster.node_metrics import Nodes
from actors.cluster.prometheus import PrometheusBackend
from tests.fixtures.tracking import exercise

RUN = 'run="pipe/grpo"'


def test_metrics_reach_the_export_port_and_nodes_say_how_busy_they_are(ray_local: None, tmp_path: Path) -> None:
    (node,) = ray.nodes()
    placement: Any = SimpleNamespace(nodes=lambda: {node["NodeID"]})
    nodes = Nodes(placement)
    nodes.here, nodes.addresses = "driver", {"driver": "driver"}  # so the only node is another node, with an actor
    exercise(tmp_path, PrometheusBackend("pipe/grpo"))
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    values, busy, until = dict[str, float](), dict[str, float](), time.monotonic() + 60.0
    while (len(values) < 4 or len(busy) < 4) and time.monotonic() < until:
        busy = {key: one.result() for key, one in asyncio.run(nodes.use()).items()}
        lines = urllib.request.urlopen(url, timeout=5.0).read().decode().splitlines()
        ours = [line.split("{") for line in lines if line.startswith("ray_rlhf_") and RUN in line]
        values = {name + "".join(re.findall(',name="(.*?)"', rest)): float(rest.split()[-1]) for name, rest in ours}
        time.sleep(0.2)
    nodes.end()
    assert values == {
        "ray_rlhf_step": 2.0,
        "ray_rlhf_update_lr": 0.125,
        "ray_rlhf_rewards_meancorrect": 0.25,
        "ray_rlhf_rollouts_tokens_total": 12.0,  # 7 + 5
    }
    address = node["NodeManagerAddress"]
    assert busy.keys() == {f"system/{at}/{key}" for at in ("driver", address) for key in ("cpu_fraction", "memory_gib")}
    assert all(value >= 0.0 for value in busy.values())
