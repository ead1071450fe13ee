"""The host of one of two engines is lost during a run, another host joins, and the run goes on.

Hosts are network namespaces (tests/hosts.py). A host loses all its processes at once, or its network. A run whose only
engine gets its weights by broadcast would end.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.chaos.faults import TimelineTail, wait_until
from tests.chaos.survival import BASE, LIMIT_S, MODES, REWARD, contradictions, unrecorded, wait_for_end
from tests.hosts import several_hosts, start_node, start_ray
from tests.integration.recipes import merge, rlhf, write_config
from tests.integration.test_node_loss import QUICK_HEALTH

pytestmark = [pytest.mark.multinode, pytest.mark.chaos, pytest.mark.timeout(900)]

APART: Mapping[str, Any] = {
    "train": {"steps": 30},
    "cluster": {
        "object_store_gib": None,
        "roles": {
            "policy": {"node_labels": {"pool": "train"}},
            "rollout": {"engines": 2, "cpus": 1.0, "node_labels": {"pool": "serve"}},
        },
    },
}


@pytest.mark.parametrize("how", ["kill", "cut"])
@pytest.mark.parametrize("mode", ["in turns", "in flight"])
def test_a_run_survives_the_loss_of_an_engines_host(
    mode: Literal["in turns", "in flight"], how: Literal["kill", "cut"], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    tree = merge(merge(BASE, MODES[mode].changes), APART)
    config = write_config(tmp_path / "run.yaml", {"run": {"name": "run", "dir": str(tmp_path), "seed": 3}}, tree)
    with several_hosts(4) as hosts, (tmp_path / "run.log").open("w") as log:
        head, _, lost, spare = hosts
        labels = ["pool=train", "pool=serve", "pool=serve"]
        address = start_ray(hosts[:3], cpus=[1, 1, 1], labels=labels, env=QUICK_HEALTH)
        process = head.start(
            [*rlhf(), "train", config, "--quiet", f"cluster.address={address}"], stdout=log, stderr=subprocess.STDOUT
        )
        tail = TimelineTail(run / "timeline.json")
        try:
            assert wait_until(lambda: tail.count("step") >= 1, lambda: process.poll() is not None, limit_s=LIMIT_S)
            lose: Callable[[], None] = {"kill": lost.kill, "cut": lost.cut}[how]
            lose()
            start_node(spare, f"--address={address}", "--num-cpus=1", "--labels=pool=serve", env=QUICK_HEALTH)
            assert wait_for_end(process, LIMIT_S) == 0, (tmp_path / "run.log").read_text()[-4000:]
        finally:
            process.kill()
        assert not contradictions(run, None)
        assert not unrecorded(run, "rollout")
