"""The load of nodes is measured. tests/integration/test_prometheus.py measures real nodes."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.cluster import node_metrics as module
from actors.cluster.node_metrics import Nodes
from rlhf.tracking.metrics.reductions import Last

HERE, FIRST, SECOND = (digit * 56 for digit in "abc")
ADDRESSES = {HERE: "10.0.0.1", FIRST: "10.0.0.2", SECOND: "10.0.0.3"}
LOAD = {"memory_gib": Last(value=1.0)}


class Run:
    """A run with scripted answers of nodes: a load, an error, or no answer yet (None)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.placed = {HERE, FIRST}
        self.answers: dict[str, Any] = {FIRST: LOAD, SECOND: LOAD}
        self.started: list[str] = []
        self.asked: list[str] = []
        alive = [{"NodeID": node, "NodeManagerAddress": at, "Alive": True} for node, at in ADDRESSES.items()]
        monkeypatch.setattr(module, "ANSWER_WITHIN_S", 0.05)
        monkeypatch.setattr(module, "NodeSampler", lambda: SimpleNamespace(take=lambda: LOAD))
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=self.options))
        placement: Any = SimpleNamespace(nodes=lambda: set(self.placed))
        self.nodes = Nodes(placement)

    def options(self, *, scheduling_strategy: Any, **_: Any) -> Any:
        node = scheduling_strategy.node_id
        self.started.append(node)
        take = SimpleNamespace(remote=lambda: self.ask(node))
        return SimpleNamespace(remote=lambda: SimpleNamespace(take=take))

    def ask(self, node: str) -> Any:
        self.asked.append(node)
        return SimpleNamespace(future=lambda: self.future(node))

    def future(self, node: str) -> Future[Any]:
        future: Future[Any] = Future()
        answer = self.answers[node]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(answer)
        return future

    async def measured(self) -> set[str]:
        """Return the nodes with metrics."""
        addresses = {key.split("/")[1] for key in await self.nodes.use()}
        return {node for node, at in ADDRESSES.items() if at in addresses}


async def test_a_node_that_replaces_a_lost_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    assert await run.measured() == {HERE, FIRST}
    run.placed, run.answers[FIRST] = {HERE, SECOND}, RayActorError()
    assert await run.measured() == await run.measured() == {HERE, SECOND}
    assert run.started == [FIRST, SECOND]
    assert run.asked == [FIRST, FIRST, SECOND, SECOND], "a node whose actor failed is not asked again"


async def test_a_late_node_is_left_out_only_until_its_answer_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(monkeypatch)
    run.answers[FIRST] = None
    assert await run.measured() == await run.measured() == {HERE}
    assert run.asked == [FIRST], "it is not asked again before it has answered"
    assert len(caplog.records) == 1
    run.answers[FIRST] = LOAD
    assert await run.measured() == {HERE, FIRST}
