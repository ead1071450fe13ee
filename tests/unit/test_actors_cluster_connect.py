"""A local Ray starts after checks, a run waits for the bundles of a lost node, and small shared memory is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import shutil
import stat
import subprocess
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray._private import worker

from actors.cluster import placement as module
from actors.cluster.address import cluster_to_join, word_of_cluster
from actors.cluster.connect import OWN_RAY, _private_temp, _refuse_few_open_files, _start_daemons, connected
from actors.cluster.placement import NoRoom, Placement, Seats, missing_resources, reserve_roles
from actors.cluster.shared_memory import judge, refuse_small_shared_memory
from rlhf.config.mistakes.explain import parse
from rlhf.config.placement_plan import PlacementPlan, WorkerSlot
from rlhf.config.schema.cluster import ClusterConfig, EngineRange
from rlhf.config.schema.root import Config
from rlhf.errors import NodeNotReplaced, RunError, UserError
from rlhf.planning.shared_memory import SharedMemoryRoom, SnapshotBytes


def test_too_few_open_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_few_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    with pytest.raises(UserError, match=r"may open 64 files here \(`ulimit -n`\), but a run needs 256"):
        _refuse_few_open_files()


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for Ray's files, with an unusually long path."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("actors.cluster.connect.LONGEST_SOCKET", 1000)
    return tmp_path / f"ray-{os.getuid()}"


def test_nobody_else_can_enter_the_folder_of_ray_or_put_it_there(tmp_path: Path, temp: Path) -> None:
    temp.mkdir()
    temp.chmod(0o777)
    assert _private_temp() == temp
    assert stat.S_IMODE(temp.stat().st_mode) == 0o700
    temp.rename(tmp_path / "elsewhere")
    temp.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a folder that belongs to this user"):
        _private_temp()


def test_a_path_that_is_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("a" * 100)))
    with pytest.raises(UserError, match=r"longer than 107 characters. Set RAY_TMPDIR to a folder with a short path"):
        _private_temp()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_local_ray_that_does_not_start_is_started_once_more(
    temp: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A node has 30 s to start Ray, sometimes too short on a busy machine."""
    daemons: list[subprocess.Popen[bytes]] = []

    def init(**_: Any) -> None:
        daemons.append(subprocess.Popen(["sleep", "60"]))
        if len(daemons) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's Ray may be there
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("actors.cluster.connect._own_session", lambda temp: None)
    try:
        with pytest.raises(RunError, match="timed out") if failures == 2 else nullcontext(), connected(ClusterConfig()):
            assert daemons[0].poll() is not None
            assert daemons[1].poll() is None
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
    assert len(daemons) == 2


def test_a_local_ray_has_the_cpus_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", options.update)
    monkeypatch.setattr("actors.cluster.connect.num_cpus", lambda: 3)
    _start_daemons(ClusterConfig(), tmp_path)
    assert options["num_cpus"] == 3


def test_what_ray_tells_the_driver_goes_to_the_log_and_not_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    poll = iter([(b"", {"job_id": None, "error_message": "A worker died."})])
    stopped = threading.Event()

    def next_message() -> Any:
        stopped.set()
        return next(poll)

    subscriber = SimpleNamespace(subscribe=lambda: None, poll=next_message)
    driver = SimpleNamespace(gcs_error_subscriber=subscriber, current_job_id=SimpleNamespace(binary=lambda: b"1"))
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with caplog.at_level("INFO"), connected(ClusterConfig()):
        worker.listen_error_messages(cast("Any", driver), stopped)
    assert capsys.readouterr().out == ""
    assert "Ray: A worker died." in caplog.messages


def test_workers_read_and_write_utf_8_whatever_the_locale() -> None:
    placement = SimpleNamespace(slots={"policy": [SimpleNamespace(cpus=1.0, gpus=0.0, bundle=0)]})
    placement = Placement(group=cast("Any", None), plan=cast("Any", placement))
    options = placement.options("policy", 0, {"OMP_NUM_THREADS": "1"})
    assert options["runtime_env"] == {"env_vars": {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide RAY_ADDRESS and any record of `ray start` on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()


@pytest.mark.parametrize(
    ("configured", "named", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", None, "ray://head:10001"),
    ],
)
def test_the_config_names_a_cluster_before_the_environment_does(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, named: str | None, joined: str | None
) -> None:
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    assert cluster_to_join(configured) == joined


def test_auto_is_what_ray_start_left_word_of_or_is_refused_as_a_dashboard_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word_of_cluster().write_text("10.0.0.3:6379\n")
    assert cluster_to_join("auto") == "10.0.0.3:6379"
    assert cluster_to_join(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_to_join(None) == "10.0.0.3:6379"
    word_of_cluster().unlink()
    absent = r"auto, but no cluster was started on this machine with `ray start`"
    dashboard = r"http://127.0.0.1:8265 .* is the address of a dashboard"
    for configured, named, message in (
        ("auto", "", absent),
        (None, "auto", absent),
        ("auto", "auto", absent),
        (None, "http://127.0.0.1:8265", dashboard),
    ):
        monkeypatch.setenv("RAY_ADDRESS", named)
        with pytest.raises(UserError, match=message):
            cluster_to_join(configured)


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
    monkeypatch.setattr("rlhf.planning.shared_memory._object_store_bytes", lambda: 0)  # the tests' own Ray may run
    refusal = r"^cluster.restarts.gang: is above 0, but /dev/shm has 0.01 GiB, and the run needs 0.0.*"
    remedies = r"docker run --shm-size=1g.*fewer ranks on a node.*cluster.restarts.gang=0"
    with pytest.raises(UserError, match=refusal + remedies) if is_refused else nullcontext():
        asyncio.run(refuse_small_shared_memory(config_of(gang=gang), placement_of("a", "a")))


def test_a_model_of_unknown_sizes_is_left_to_its_ranks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(refuse_small_shared_memory(config_of("some/model"), placement_of("a")))
    known = "whether /dev/shm is large enough is known only when the models are loaded: the sizes of some/model"
    assert known in caplog.text


def test_the_object_store_of_ray_takes_room_and_copies_are_only_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = SnapshotBytes({"policy": 3 * 2**30}, copies=2 * 2**30)
    judge(SharedMemoryRoom(total=6 * 2**30, free=0, ray=2**30), snapshots, where="/dev/shm")
    assert not caplog.text
    judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=2 * 2**30), snapshots, where="/dev/shm of 10.0.0.2")
    assert "/dev/shm of 10.0.0.2 has 5.00 GiB, and the run needs 7.00 GiB" in caplog.text
    assert "copies of other nodes 2.00 + Ray's objects 2.00" in caplog.text
    with pytest.raises(UserError, match=r"--shm-size=8g"):
        judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=3 * 2**30), snapshots, where="/dev/shm")


def test_roles_that_compute_at_the_same_time_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"bundles_to_node_id": {0: "a", 1: "a", 2: "b"}}
    monkeypatch.setattr(module, "placement_group_table", lambda group: table)
    nodes = [{"NodeID": name, "Resources": {"CPU": 8.0}} for name in "ab"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    slots = {"policy": [SimpleNamespace(bundle=0)], "rollout": [SimpleNamespace(bundle=1), SimpleNamespace(bundle=2)]}
    made = Placement(group=cast("Any", None), plan=cast("Any", SimpleNamespace(slots=slots)))
    assert (made.threads("policy", "auto"), made.threads("rollout", "auto")) == ([8], [8, 8])
    at_once = replace(made, at_once=True)
    assert (at_once.threads("policy", "auto"), at_once.threads("rollout", "auto")) == ([4], [4, 8])
    assert at_once.threads("rollout", 3) == [3, 3]
