"""A run waits for the bundles of a lost node, with scripted states of a placement group."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from actors.cluster import placement as module
from actors.cluster.placement import NoRoom, Placement, Seats, missing_resources, reserve_roles
from rlhf.config.placement_plan import PlacementPlan, WorkerSlot
from rlhf.config.schema.cluster import ClusterConfig, EngineRange
from rlhf.errors import NodeNotReplaced, RunError, UserError

PLAN = PlacementPlan(
    bundles=({"CPU": 1.0},), slots={"reference": (WorkerSlot(bundle=0, cpus=1.0, gpus=0.0),)}, labels=({},)
)
PLACEMENT = Placement(group=cast("Any", "group"), plan=PLAN)


def give_states(monkeypatch: pytest.MonkeyPatch, *states: str) -> list[str]:
    """Give the group a sequence of states; the last state stays."""
    left = list(states)
    monkeypatch.setattr(module, "placement_group_table", lambda _: {"state": left.pop(0) if len(left) > 1 else left[0]})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr(module, "WHOLE_ASKED_EVERY_S", 0.0)
    return left


async def test_a_successor_waits_until_another_node_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = give_states(monkeypatch, "RESCHEDULING", "RESCHEDULING", "CREATED")
    await PLACEMENT.wait_until_whole(limit_s=60.0)
    assert left == ["CREATED"]
    give_states(monkeypatch, "RESCHEDULING")
    with pytest.raises(NodeNotReplaced, match=r"No other node took its place within 0 s \(cluster\.start_timeout_s\)"):
        await PLACEMENT.wait_until_whole(limit_s=0.0)
    assert re.search(r"(?s)is RESCHEDULING\..*reference +1 .*needed CPU: 1, available: 0.*lost nodes", caplog.text)
    monkeypatch.setattr(module.OWN_RAY, "vital", [SimpleNamespace(is_running=lambda: False)])
    with pytest.raises(RunError, match="local Ray has died"):
        await PLACEMENT.wait_until_whole(limit_s=60.0)


class Groups:
    """Ray's placement groups with limited room. Requested and returned groups are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.removed: list[str] = []
        self.room = 0
        monkeypatch.setattr(module, "placement_group", lambda bundles, **_: self.ask())
        monkeypatch.setattr(module, "remove_placement_group", self.removed.append)
        monkeypatch.setattr(module, "placement_group_table", self.table)
        monkeypatch.setattr(module, "WHOLE_ASKED_EVERY_S", 0.0)
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0})

    def ask(self) -> str:
        self.asked.append(f"group {len(self.asked)}")
        return self.asked[-1]

    def table(self, group: str) -> dict[str, Any]:
        present = [one for one in self.asked if one not in self.removed]
        is_placed = group in present[: self.room]
        return {"state": "CREATED" if is_placed else "PENDING", "bundles_to_node_id": {0: f"node of {group}"}}


async def test_a_seat_is_taken_when_there_is_room_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(monkeypatch)
    seats = Seats(PLAN, EngineRange(min=1, max=2))
    first, second = (asyncio.create_task(seats.take(rank, limit_s=None)) for rank in (0, 1))
    await asyncio.sleep(0.01)
    assert sorted(seats.groups()) == ["group 0", "group 1"]
    groups.room = 1
    await first
    assert seats.nodes() == {0: "node of group 0"}
    second.cancel()
    await asyncio.wait([second])
    assert groups.removed == ["group 1"], "no request outlives its wait"
    await seats.take(0, limit_s=60.0)
    assert groups.removed == ["group 1", "group 0"], "the old room is given back before another one is asked for"
    assert seats.nodes() == {0: "node of group 2"}
    with pytest.raises(NoRoom, match="PENDING"):
        await seats.take(1, limit_s=0.0)
    assert seats.groups() == ["group 2"]


async def test_a_run_that_is_ended_while_it_waits_for_room_leaves_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Any] = []
    group = SimpleNamespace(ready=lambda: SimpleNamespace(future=Future))
    node = {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(module, "placement_group", lambda bundles, **_: group)
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    waiting = asyncio.create_task(reserve_roles(["policy"], ClusterConfig(), with_reward_model=False))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert removed == [group]


def report(*types: str) -> str:
    return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(types, 1), "idle_nodes": None}})


@pytest.mark.parametrize(
    ("label", "status", "waits"),
    [
        ({}, report("node_ab"), False),
        ({"ray.io/node-group": "head"}, report("node_ab"), False),  # KubeRay with a fixed number of pods
        ({"ray.io/node-group": "head"}, report("head-group"), True),
        ({"ray.io/node-group": "head"}, "{}", True),  # an autoscaler that has not started yet, or one without reports
        ({"ray.io/node-group": "head"}, None, True),
    ],
)
async def test_only_a_cluster_with_an_autoscaler_waits_for_nodes_that_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch, label: dict[str, str], status: str | None, waits: bool
) -> None:
    groups = Groups(monkeypatch)
    monkeypatch.setattr(groups, "ask", lambda: SimpleNamespace(ready=lambda: SimpleNamespace(future=Future)))
    monkeypatch.setattr(module, "placement_group_table", lambda _: {"state": "PENDING"})
    monkeypatch.setattr(module, "_internal_kv_get", lambda _: status)
    monkeypatch.setattr(module, "REPORTED_WITHIN_S", 0.0)
    monkeypatch.setattr(module, "REPORT_ASKED_EVERY_S", 0.0)
    head = {"Alive": True, "Resources": {}, "NodeID": "ab", "Labels": label}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(NoRoom if waits else UserError, match="did not get the nodes" if waits else "more than"):
        await reserve_roles(["policy"], ClusterConfig(start_timeout_s=0.05), with_reward_model=False)
    assert len(groups.removed) == waits, "the autoscaler has seen a request, which does not outlive its wait"


def test_room_on_nodes_without_the_required_labels_does_not_count() -> None:
    plan = PlacementPlan(bundles=({"CPU": 4.0}, {"CPU": 4.0}), slots={}, labels=({"pool": "a"}, {"pool": "a"}))
    nodes = [{"Resources": {"CPU": 4.0}, "Labels": {"pool": pool}} for pool in "ab"]
    assert missing_resources(plan, nodes) == " on the nodes with the required labels (cluster.roles.*.node_labels)"
    assert missing_resources(plan, [*nodes, nodes[0]]) is None
