"""Reward workers by handles that answer in this process, one group at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.processes import Processes
from actors.services import RewardWorkers
from rlhf.errors import RunError
from rlhf.rewards.scoring import RewardSpec
from rlhf.roles import CompletedGroup
from rlhf.workers.reward import RewardSettings

TASTE = RewardSpec(name="taste", weight=1.0, function=None)


class Handle:
    """A worker's, whose groups take so long."""

    def __init__(self, *, takes_s: float) -> None:
        thread = ThreadPoolExecutor(1)

        def method(call: Callable[..., Any]) -> Any:
            def remote(*args: Any) -> Any:
                future: Future[Any] = thread.submit(call, *args)
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=remote)

        self.start = method(lambda: None)
        self.score = method(lambda *_: time.sleep(takes_s))


async def score(handles: list[Handle], groups: int) -> None:
    """All groups at once, within a second and a half each."""
    settings = SimpleNamespace(specs=(TASTE,), processes=1, timeout_s=1.0)
    workers = RewardWorkers(cast("Any", handles), cast("RewardSettings", settings), deadline_s=1.5)
    await workers.start(deadline_s=5.0)
    waiting = [
        SimpleNamespace(request=SimpleNamespace(group_id=i, prompt=None), rollouts=None, infos=())
        for i in range(groups)
    ]
    await asyncio.gather(*(workers.score(cast("CompletedGroup", group)) for group in waiting))


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the handles are not looked for."""

    async def found(self: Processes, *, deadline_s: float) -> None: ...

    monkeypatch.setattr(Processes, "found", found)


def test_waiting_for_a_worker_does_not_count() -> None:
    asyncio.run(score([Handle(takes_s=0.4), Handle(takes_s=0.4)], groups=10))


def test_work_that_takes_too_long_does() -> None:
    with pytest.raises(RunError, match="rewards: reward rank 0 gave no answer"):
        asyncio.run(score([Handle(takes_s=3.0)], groups=1))
