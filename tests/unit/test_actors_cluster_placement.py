"""The wait for the bundles of a lost node, with states of a placement group that the test gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from actors.cluster import placement as module
from actors.cluster.placement import Placement
from rlhf.config.placement_plan import PlacementPlan, WorkerSlot
from rlhf.errors import RunError

PLAN = PlacementPlan(
    bundles=({"CPU": 1.0},), slots={"reference": (WorkerSlot(bundle=0, cpus=1.0, gpus=0.0),)}, labels=({},)
)
PLACEMENT = Placement(group=cast("Any", "group"), plan=PLAN)


def give_states(monkeypatch: pytest.MonkeyPatch, *states: str) -> list[str]:
    """Let the group have these states in turn, and the last one for ever."""
    left = list(states)
    monkeypatch.setattr(module, "placement_group_table", lambda _: {"state": left.pop(0) if len(left) > 1 else left[0]})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr(module, "WHOLE_ASKED_EVERY_S", 0.0)
    return left


async def test_a_successor_waits_until_another_node_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    left = give_states(monkeypatch, "RESCHEDULING", "RESCHEDULING", "CREATED")
    await PLACEMENT.wait_until_whole(limit_s=60.0)
    assert left == ["CREATED"]


async def test_without_another_node_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    give_states(monkeypatch, "RESCHEDULING")
    with pytest.raises(
        RunError, match=r"(?s)is RESCHEDULING\..*reference +1 .*needed CPU: 1, available: 0.*lost nodes"
    ):
        await PLACEMENT.wait_until_whole(limit_s=0.0)


async def test_a_dead_local_ray_gets_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    give_states(monkeypatch, "RESCHEDULING")
    gone = SimpleNamespace(is_running=lambda: False)
    monkeypatch.setattr(module.OWN_RAY, "daemons", [gone])
    with pytest.raises(RunError, match="local Ray has died"):
        await PLACEMENT.wait_until_whole(limit_s=60.0)
