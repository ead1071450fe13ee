"""A run waits for the bundles of a lost node, and is refused without room in a simulated /dev/shm."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from actors.cluster import placement as module
from actors.cluster.connect import OWN_RAY
from actors.cluster.placement import NoRoom, Placement, Seats, missing_resources, reserve_roles
from actors.cluster.shared_memory import judge, refuse_small_shared_memory
from rlhf.config.mistakes.explain import parse
from rlhf.config.placement_plan import PlacementPlan, WorkerSlot
from rlhf.config.schema.cluster import ClusterConfig, EngineRange
from rlhf.config.schema.root import Config
from rlhf.errors import NodeNotReplaced, RunError, UserError
from rlhf.planning.shared_memory import SharedMemoryRoom, SnapshotBytes, snapshots_by_node

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


def config_of(model: str = "tiny:llama", *, gang: int = 5) -> Config:
    return parse(
        {
            "run": {"name": "run"},
            "policy": {"model": model, "dtype": "float32"},
            "algorithm": {"name": "sft"},
            "data": {"train": "x.jsonl"},
            "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4},
            "cluster": {"restarts": {"gang": gang}, "roles": {"policy": {"workers": 2}}},
        }
    )


def placement_of(*nodes: str) -> Any:
    return SimpleNamespace(nodes=lambda: set(nodes), nodes_of=lambda role: list(nodes))


@pytest.mark.parametrize(("mib", "gang", "is_refused"), [(64, 5, False), (8, 5, True), (8, 0, False)])
def test_a_run_without_room_for_its_snapshots_is_refused(
    monkeypatch: pytest.MonkeyPatch, mib: int, gang: int, is_refused: bool
) -> None:
    # The tiny model has 393,888 parameters, of which each rank keeps 12 bytes twice: 9 MiB for both ranks.
    total = mib * 2**20
    monkeypatch.setattr(OWN_RAY, "daemons", [object()])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, 0, total))
    refusal = r"^cluster.restarts.gang: is above 0, but /dev/shm has 0.01 GiB, and the run needs 0.0.*"
    remedies = r"docker run --shm-size=1g.*fewer ranks on a node.*cluster.restarts.gang=0"
    with pytest.raises(UserError, match=refusal + remedies) if is_refused else nullcontext():
        asyncio.run(refuse_small_shared_memory(config_of(gang=gang), placement_of("a", "a")))


def test_a_model_of_unknown_sizes_is_left_to_its_ranks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(refuse_small_shared_memory(config_of("some/model"), placement_of("a")))
    assert "/dev/shm is examined only when the models are loaded: the sizes of some/model" in caplog.text


def test_the_object_store_of_ray_takes_room_and_copies_are_only_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = SnapshotBytes({"policy": 3 * 2**30}, copies=2 * 2**30)
    judge(SharedMemoryRoom(total=6 * 2**30, free=0, ray=2**30), snapshots, where="/dev/shm")
    assert not caplog.text
    judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=2 * 2**30), snapshots, where="/dev/shm of 10.0.0.2")
    assert "/dev/shm of 10.0.0.2 has 5.00 GiB, and the run needs 7.00 GiB" in caplog.text
    assert "copies of other nodes 2.00 + Ray's objects 2.00" in caplog.text
    with pytest.raises(UserError, match=r"--shm-size=8g"):
        judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=3 * 2**30), snapshots, where="/dev/shm")


def test_a_node_holds_its_own_snapshots_and_a_share_of_the_copies() -> None:
    ranks: dict[Any, list[str]] = {"policy": ["a", "a"], "critic": ["b"]}
    assert snapshots_by_node({"policy": 4, "critic": 3}, ranks, {"a", "b", "c"}) == {
        "a": SnapshotBytes({"policy": 8}, 3),
        "b": SnapshotBytes({"critic": 3}, 4),
        "c": SnapshotBytes({}, 4),
    }
    assert snapshots_by_node({"policy": 4}, {"policy": ["a"]}, {"a"}) == {"a": SnapshotBytes({"policy": 4})}
