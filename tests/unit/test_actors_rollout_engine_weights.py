"""An engine's failed update of weights is repeated. A loop runs calls at once."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.rollout import engine_weights
from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_weights import EngineWeights
from actors.rollout.vllm_engine import LoadedWeights
from rlhf.errors import RunError


class Loop:
    name = "rollout engine 0"
    num_waiting = 0
    last_step = 0.0
    is_paused = False

    def call(self, work: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(None))
        except FileNotFoundError as error:
            future.set_exception(error)
        return future


def manifest(version: int) -> Any:
    return SimpleNamespace(version=version, checksum="sum", transport="shm")


def weights(loop: Loop, *, deadline_s: float = 20.0) -> EngineWeights:
    spec: Any = SimpleNamespace(name=loop.name, is_frozen=False, kv_after_update="recompute")
    return EngineWeights(spec, EngineCalls(cast(Any, loop), deadline_s=deadline_s))


async def test_an_engine_waits_for_the_repetition_of_an_update_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = True

    def load(engine: Any, manifest: Any, *, keep_cache: bool) -> LoadedWeights:
        if not is_there:
            raise FileNotFoundError("the policy's memory")
        return LoadedWeights(checksums=("sum",), version=manifest.version, reusable_blocks=0)

    monkeypatch.setattr(engine_weights, "load_weights", load)
    held = weights(loop := Loop())
    with pytest.raises(RunError, match="has not received the policy's weights yet"):
        await held.settled_version()
    await held.update(manifest(1), 1)
    assert (await held.settled_version(), loop.is_paused) == (1, False)
    is_there = False
    with pytest.raises(FileNotFoundError):
        await held.update(manifest(2), 2)
    waiting = asyncio.create_task(held.settled_version())
    await asyncio.sleep(0.01)
    assert (waiting.done(), loop.is_paused) == (False, True)
    is_there = True
    await held.update(manifest(2), 2)
    assert (await waiting, loop.is_paused) == (2, False)
