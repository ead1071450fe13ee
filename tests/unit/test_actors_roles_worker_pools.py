"""Reward workers by handles that answer in this process, one group at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest

from actors.cluster.processes import Processes
from actors.roles import worker_pools as services
from actors.roles.worker_pools import RewardWorkers
from rlhf.errors import RunError
from rlhf.rewards.scoring import RewardSpec
from rlhf.rewards.services.client import ServiceSpec
from rlhf.rewards.services.remote import RemoteReward
from rlhf.roles import CompletedGroup
from rlhf.workers.frozen.reward import RewardSettings

TASTE = RewardSpec(name="taste", weight=1.0, function=None)
STYLE = RewardSpec(
    name="style",
    weight=1.0,
    function=None,
    remote=RemoteReward(
        service=ServiceSpec(url="http://h/", timeout_s=1.0, deadline_s=1.0, max_in_flight=5), judge=None
    ),
    only={"kind": ("a",)},
)


class Handle:
    """A worker's, whose groups take so long."""

    def __init__(self, *, takes_s: float, asked_at_once: int = 1, ping_takes_s: float = 0.0) -> None:
        thread, threads = ThreadPoolExecutor(1), ThreadPoolExecutor(16)
        self.asked, self.asking, self.most_asking = 0, 0, 0
        together, lock = threading.Barrier(asked_at_once), threading.Lock()

        def method(call: Callable[..., Any], threads: ThreadPoolExecutor) -> Any:
            def remote(*args: Any) -> Any:
                future: Future[Any] = threads.submit(call, *args)
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=remote)

        def ask(*_: Any) -> dict[str, Any]:
            with lock:
                self.asked += 1
                self.asking += 1
                self.most_asking = max(self.most_asking, self.asking)
            together.wait(10.0)
            time.sleep(0.02)  # one more call would come meanwhile
            with lock:
                self.asking -= 1
            return {"style": "told"}

        self.given: list[Any] = []

        def score(prompt: Any, rollouts: Any, truncated: Any, asked: Any, environment: Any) -> None:
            self.given.append(asked)
            time.sleep(takes_s)

        self.start = method(lambda: None, thread)
        self.score = method(score, thread)
        self.ask = method(ask, threads)
        self.pings = 0

        def ping() -> None:
            self.pings += 1
            time.sleep(ping_takes_s)

        self.ping = method(ping, threads)


async def score(handles: list[Handle], groups: int, *specs: RewardSpec, columns: Any = MappingProxyType({})) -> None:
    """All groups at once, within a second and a half each."""
    settings = SimpleNamespace(specs=(TASTE, *specs), processes=1, timeout_s=1.0)
    workers = RewardWorkers(cast("Any", handles), settings=cast("RewardSettings", settings), deadline_s=1.5)
    await workers.start(deadline_s=5.0)
    waiting = [
        SimpleNamespace(
            request=SimpleNamespace(group_id=i, prompt=SimpleNamespace(columns=columns)), rollouts=None, infos=()
        )
        for i in range(groups)
    ]
    await asyncio.gather(*(workers.score(cast("CompletedGroup", group)) for group in waiting))


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the handles are not looked for."""

    async def wait_until_started(self: Processes, *, deadline_s: float) -> None: ...

    monkeypatch.setattr(Processes, "wait_until_started", wait_until_started)


def test_waiting_for_a_worker_does_not_count() -> None:
    asyncio.run(score([Handle(takes_s=0.4), Handle(takes_s=0.4)], groups=10))


def test_work_that_takes_too_long_does() -> None:
    with pytest.raises(RunError, match=r"reward rank 0 did not answer within 2 s \(the limits of the rewards and"):
        asyncio.run(score([Handle(takes_s=3.0)], groups=1))


def test_a_worker_that_stands_still_is_noticed_before_its_rewards_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "PING_EVERY_S", 0.2)
    monkeypatch.setattr(services, "longest_s", lambda *_, **__: 300.0)
    busy = Handle(takes_s=2.5)
    asyncio.run(score([busy], 1))
    assert busy.pings >= 2
    with pytest.raises(RunError, match=r"reward rank 0 did not answer within 2 s \(cluster.call_timeout_s\)"):
        asyncio.run(score([Handle(takes_s=4.0, ping_takes_s=4.0)], 3))


def test_services_are_asked_about_many_groups_at_once() -> None:
    handle = Handle(takes_s=0.0, asked_at_once=5)  # each call waits until five have come
    asyncio.run(score([handle], 10, STYLE, columns={"kind": "a"}))
    assert handle.most_asking == 5
    assert handle.given == [{"style": "told"}] * 10


def test_services_are_not_asked_about_rows_of_others() -> None:
    handle = Handle(takes_s=0.0)
    asyncio.run(score([handle], 2, STYLE, columns={"kind": "b"}))
    assert (handle.asked, handle.given) == (0, [{}, {}])
