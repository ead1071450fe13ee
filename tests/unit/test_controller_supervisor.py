"""rlhf/controller/supervisor.py replaces lost workers, records losses, and ends the run at the limit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.cluster import Restarts
from rlhf.controller import supervisor as module
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import LossKind, NodeNotReplaced, Preempted, RunError, StorageFull, WorkerLost
from rlhf.process.driver_parent import DriverDeath
from rlhf.tracking.run_folder.errors import write_error
from rlhf.tracking.run_folder.timeline import Timeline


class Tracker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alerts: list[str] = []

    def log_error(self, error: Any) -> None:
        write_error(self.folder, error)

    def alert(self, severity: str, title: str, text: str) -> None:
        self.alerts.append(title)


class Record:
    def __init__(self, folder: Path) -> None:
        self.step = 6
        self.tracker = Tracker(folder)
        self.timeline = Timeline(folder / "timeline.json")


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Any]:
    made = Record(tmp_path)
    yield made
    made.timeline.close()


def lost(*, role: str = "rollout", rank: int = 0, kind: LossKind = "died") -> WorkerLost:
    return WorkerLost(f"rollouts: {role} rank {rank} died.", role=role, rank=rank, stage="rollouts", kind=kind)


class Rebuild:
    """Counts calls, and fails on request."""

    def __init__(self, error: Exception | None = None) -> None:
        self.count = 0
        self.error = error

    async def __call__(self) -> None:
        self.count += 1
        if self.error is not None:
            raise self.error


def test_a_lost_node_without_a_successor_preempts_the_run(record: Any) -> None:
    rebuild = Rebuild(NodeNotReplaced("No other node took its place within 9 s (cluster.start_timeout_s)"))
    with pytest.raises(Preempted, match=r"^rollouts: policy rank 0 died\. No other node took its place within 9 s"):
        asyncio.run(Supervisor(Restarts(), record, ("policy",)).recover(lost(role="policy"), rebuild))


def test_a_successor_without_room_ends_the_run_as_a_full_disk_does(record: Any) -> None:
    rebuild = Rebuild(StorageFull("/run/adapter could not be written."))
    with pytest.raises(StorageFull, match=r"policy rank 0 died\. Its successor could not be started: /run/adapter"):
        asyncio.run(Supervisor(Restarts(), record, ("policy",)).recover(lost(role="policy"), rebuild))


def test_a_loss_is_made_good_and_shows_everywhere(record: Any, tmp_path: Path) -> None:
    supervisor, rebuild = Supervisor(Restarts(), record, ("rollout", "policy")), Rebuild()
    asyncio.run(supervisor.recover(lost(), rebuild))
    assert rebuild.count == 1
    (line,) = [json.loads(text) for text in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert (line["step"], line["stage"], line["kind"], line["source"]) == (7, "rollouts", "died", "rollout 0")
    assert line["message"] == "rollouts: rollout rank 0 died.", "it does not say that the run can be resumed"
    assert record.tracker.alerts == ["rollout lost"]
    assert '"recovery"' in (tmp_path / "timeline.json").read_text()
    metrics = {name: value.result() for name, value in supervisor.metrics().items()}
    assert metrics["recovery/rollout/total"] == 1.0
    assert metrics["recovery/policy/total"] == 0.0
    assert metrics["time/recovery_s"] > 0.0
    assert {value.result() for value in supervisor.metrics().values()} == {0.0}


def test_the_deaths_of_drivers_show_everywhere(record: Any, tmp_path: Path) -> None:
    supervisor = Supervisor(Restarts(), record, ("policy",))
    deaths = [DriverDeath(at=time.time() - 9.0, kind="died", message=f"The driver died {place}.") for place in "ab"]
    supervisor.continue_after(deaths)
    lines = [json.loads(text) for text in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"], line["kind"], line["message"]) for line in lines] == [
        (7, "driver", "died", "The driver died a."),
        (7, "driver", "died", "The driver died b."),
    ]
    assert record.tracker.alerts == ["driver lost"]
    assert '"recovery"' in (tmp_path / "timeline.json").read_text()
    metrics = {name: value.result() for name, value in supervisor.metrics().items()}
    assert (metrics["recovery/controller/total"], metrics["recovery/policy/total"]) == (2.0, 0.0)
    assert 9.0 <= metrics["time/recovery_s"] < 60.0


def test_a_driver_without_a_predecessor_records_nothing(record: Any, tmp_path: Path) -> None:
    supervisor = Supervisor(Restarts(), record, ("policy",))
    supervisor.continue_after([])
    assert not (tmp_path / "errors.jsonl").exists()
    assert {value.result() for value in supervisor.metrics().values()} == {0.0}


def test_the_run_ends_after_too_many_losses_in_the_window(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    supervisor, rebuild = Supervisor(Restarts(engine=2, window_s=100), record, ("rollout",)), Rebuild()

    async def losses() -> None:
        nonlocal now
        for at in (0.0, 50.0, 101.0):  # the third is outside the window of the first
            now = at
            await supervisor.recover(lost(), rebuild)
        now = 102.0
        with pytest.raises(WorkerLost):
            await supervisor.recover(lost(), rebuild)

    asyncio.run(losses())
    assert rebuild.count == 3


def test_roles_of_one_kind_are_counted_apart(record: Any) -> None:
    supervisor, rebuild = Supervisor(Restarts(worker=1), record, ("reference", "reward")), Rebuild()

    async def losses() -> None:
        await supervisor.recover(lost(role="reference"), rebuild)
        await supervisor.recover(lost(role="reward"), rebuild)
        with pytest.raises(WorkerLost):
            await supervisor.recover(lost(role="reward", rank=1), rebuild)

    asyncio.run(losses())


def test_losses_of_the_policy_and_the_critic_are_counted_together(record: Any) -> None:
    supervisor, rebuild = Supervisor(Restarts(gang=1), record, ("policy", "critic")), Rebuild()

    async def losses() -> None:
        await supervisor.recover(lost(role="policy"), rebuild)
        with pytest.raises(WorkerLost):
            await supervisor.recover(lost(role="critic"), rebuild)

    asyncio.run(losses())
    assert rebuild.count == 1


def test_the_same_work_ends_the_run_at_the_second_loss_in_a_row(record: Any) -> None:
    supervisor, rebuild = Supervisor(Restarts(), record, ("rollout",)), Rebuild()

    async def losses() -> None:
        await supervisor.recover(lost(), rebuild, work=("group", 3))
        await supervisor.recover(lost(rank=1), rebuild, work=("group", 3))  # another worker
        supervisor.succeeded("rollout", 0)
        await supervisor.recover(lost(), rebuild, work=("group", 3))  # it worked in between
        with pytest.raises(WorkerLost):
            await supervisor.recover(lost(), rebuild, work=("group", 3))

    asyncio.run(losses())
    assert rebuild.count == 3


def test_memory_that_is_exhausted_twice_ends_the_run(record: Any) -> None:
    supervisor, rebuild = Supervisor(Restarts(), record, ("rollout",)), Rebuild()

    async def losses() -> None:
        await supervisor.recover(lost(kind="out_of_memory"), rebuild)
        await supervisor.recover(lost(), rebuild)
        with pytest.raises(WorkerLost):
            await supervisor.recover(lost(kind="out_of_memory", rank=1), rebuild)

    asyncio.run(losses())
    assert rebuild.count == 2


def test_a_successor_that_does_not_start_ends_the_run_with_both_reasons(record: Any) -> None:
    supervisor = Supervisor(Restarts(), record, ("rollout",))
    with pytest.raises(RunError, match=r"rank 0 died\..*could not be started: no room"):
        asyncio.run(supervisor.recover(lost(), Rebuild(RunError("no room"))))


class RebuildLoses:
    """Loses a number of successors before a working successor."""

    def __init__(self, losses: int) -> None:
        self.left = losses
        self.raised: list[WorkerLost] = []

    async def __call__(self) -> None:
        if self.left:
            self.left -= 1
            self.raised.append(lost())
            raise self.raised[-1]


def test_a_successor_that_is_lost_too_is_started_again_once(record: Any, tmp_path: Path) -> None:
    supervisor, once, twice = Supervisor(Restarts(), record, ("rollout",)), RebuildLoses(1), RebuildLoses(2)
    asyncio.run(supervisor.recover(lost(), once, work="a step"))
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 2
    assert supervisor.metrics()["recovery/rollout/total"].result() == 2.0
    supervisor.succeeded("rollout", 0)
    with pytest.raises(WorkerLost) as ended:
        asyncio.run(supervisor.recover(lost(), twice, work="a step"))
    assert ended.value is twice.raised[1], "twice in a row at its start"
