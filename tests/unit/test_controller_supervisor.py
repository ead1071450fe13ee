"""rlhf/controller/supervisor.py replaces lost workers, records losses, and ends the run at the limit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.schema.cluster import Restarts
from rlhf.controller import supervisor as module
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import LossKind, NodeNotReplaced, Preempted, RunError, StorageFull, WorkerLost
from rlhf.process.driver_parent import DriverDeath
from rlhf.role_table import ROLES
from rlhf.tracking.run_folder.errors import write_error
from rlhf.tracking.run_folder.timeline import Timeline


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Any]:
    """Return a run's record after step 6, with the titles of the alerts."""
    alerts: list[str] = []
    tracker = SimpleNamespace(
        log_error=lambda error: write_error(tmp_path, error), alert=lambda _, title, __: alerts.append(title)
    )
    timeline = Timeline(tmp_path / "timeline.json")
    yield SimpleNamespace(step=6, alerts=alerts, tracker=tracker, timeline=timeline)
    timeline.close()


def supervisor_of(record: Any, **restarts: Any) -> Supervisor:
    return Supervisor(Restarts(**restarts), record, tuple(ROLES))


def lost(*, role: str = "rollout", rank: int = 0, kind: LossKind = "died") -> WorkerLost:
    return WorkerLost(f"rollouts: {role} rank {rank} died.", role=role, rank=rank, stage="rollouts", kind=kind)


class Rebuild:
    """Fails in turn with the given errors, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.count = list(errors), 0

    async def __call__(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.count += 1


def errors_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "errors.jsonl").read_text().splitlines()]


def totals(supervisor: Supervisor) -> dict[str, float]:
    return {name: value.result() for name, value in supervisor.metrics().items()}


def test_a_loss_is_made_good_and_shows_everywhere(record: Any, tmp_path: Path) -> None:
    supervisor, rebuild = supervisor_of(record), Rebuild()
    asyncio.run(supervisor.recover(lost(), rebuild))
    assert rebuild.count == 1
    (line,) = errors_of(tmp_path)
    assert (line["step"], line["stage"], line["kind"], line["source"]) == (7, "rollouts", "died", "rollout 0")
    assert line["message"] == "rollouts: rollout rank 0 died.", "it does not say that the run can be resumed"
    assert record.alerts == ["rollout lost"]
    assert '"recovery"' in (tmp_path / "timeline.json").read_text()
    metrics = totals(supervisor)
    assert (metrics["recovery/rollout/total"], metrics["recovery/policy/total"]) == (1.0, 0.0)
    assert metrics["time/recovery_s"] > 0.0
    assert set(totals(supervisor).values()) == {0.0}


def test_the_deaths_of_drivers_show_everywhere(record: Any, tmp_path: Path) -> None:
    supervisor = supervisor_of(record)
    supervisor.continue_after([])
    assert not (tmp_path / "errors.jsonl").exists()
    deaths = [DriverDeath(at=time.time() - 9.0, kind="died", message=f"The driver died {place}.") for place in "ab"]
    supervisor.continue_after(deaths)
    told = [(line["step"], line["stage"], line["kind"], line["message"]) for line in errors_of(tmp_path)]
    assert told == [(7, "driver", "died", f"The driver died {place}.") for place in "ab"]
    assert record.alerts == ["driver lost"]
    assert '"recovery"' in (tmp_path / "timeline.json").read_text()
    metrics = totals(supervisor)
    assert (metrics["recovery/controller/total"], metrics["recovery/policy/total"]) == (2.0, 0.0)
    assert 9.0 <= metrics["time/recovery_s"] < 60.0


@pytest.mark.parametrize(
    ("limits", "losses"),
    [
        pytest.param(
            {"engine": 2, "window_s": 100},
            [{"at": 0.0}, {"at": 50.0}, {"at": 101.0}, {"at": 102.0}],  # the third is outside the window of the first
            id="too many in the window",
        ),
        pytest.param(
            {"worker": 1},
            [{"role": "reference"}, {"role": "reward"}, {"role": "reward", "rank": 1}],
            id="roles of one kind are counted apart",
        ),
        pytest.param({"gang": 1}, [{"role": "policy"}, {"role": "critic"}], id="policy and critic count together"),
        pytest.param(
            {},
            [{"work": 3}, {"rank": 1, "work": 3}, {"work": 3, "after_success": True}, {"work": 3}],
            id="the same work twice in a row",
        ),
        pytest.param(
            {}, [{"kind": "out_of_memory"}, {}, {"rank": 1, "kind": "out_of_memory"}], id="memory exhausted twice"
        ),
    ],
)
def test_only_the_last_of_these_losses_ends_the_run(
    record: Any, monkeypatch: pytest.MonkeyPatch, limits: Mapping[str, Any], losses: Sequence[Mapping[str, Any]]
) -> None:
    supervisor, rebuild = supervisor_of(record, **limits), Rebuild()

    async def lose(*, at: float = 0.0, work: Any = None, after_success: bool = False, **loss: Any) -> None:
        monkeypatch.setattr(module.time, "monotonic", lambda: at)
        if after_success:
            supervisor.succeeded("rollout", 0)
        await supervisor.recover(lost(**loss), rebuild, work=work)

    async def lose_all() -> None:
        for loss in losses[:-1]:
            await lose(**loss)
        with pytest.raises(WorkerLost):
            await lose(**losses[-1])

    asyncio.run(lose_all())
    assert rebuild.count == len(losses) - 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NodeNotReplaced("No other node took its place within 9 s"), Preempted, r"died\. No other node took its place"),
        (StorageFull("/run/a could not be written."), StorageFull, r"Its successor could not be started: /run/a"),
        (RunError("no room"), RunError, r"rank 0 died\..*could not be started: no room"),
    ],
)
def test_without_a_successor_the_run_ends_with_both_reasons(
    record: Any, error: RunError, kind: type[RunError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        asyncio.run(supervisor_of(record).recover(lost(role="policy"), Rebuild(error)))


def test_a_successor_that_is_lost_too_is_started_again_once(record: Any, tmp_path: Path) -> None:
    supervisor, first, second = supervisor_of(record), lost(), lost()
    asyncio.run(supervisor.recover(lost(), Rebuild(lost()), work="a step"))
    assert len(errors_of(tmp_path)) == 2
    assert supervisor.metrics()["recovery/rollout/total"].result() == 2.0
    supervisor.succeeded("rollout", 0)
    with pytest.raises(WorkerLost) as ended:
        asyncio.run(supervisor.recover(lost(), Rebuild(first, second), work="a step"))
    assert ended.value is second, "twice in a row at its start"
