"""Several tenants load a Tinker server with random requests: no cross-talk, and nothing lost by kills of the server."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from actors.rollout.adapter_engines import AdapterEngine, AdapterEngines
from actors.serving.tinker.http import TinkerServer
from rlhf.hosting import training
from rlhf.roles import AdapterEnginesRole
from tests.fakes.adapters import now_and_then
from tests.fakes.tinker_server import MODEL, opened
from tests.integration.engine_helpers import DEADLINE_S, engine, spec
from tests.integration.test_tinker_server import Server
from tests.integration.tinker_load import (
    Answer,
    EchoEngines,
    WorkerAdapters,
    differing,
    kinds,
    run_tenants,
)

pytestmark = pytest.mark.slow
TENANTS = range(6)


@pytest.fixture(params=["checksum", "vllm"])
def engines(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[AdapterEnginesRole]:
    """Yield engines that answer from a checksum of the adapter, or a real engine with room for four adapters."""
    if request.param == "checksum":
        yield EchoEngines()
        return
    request.getfixturevalue("ray_local")
    values = spec(tiny_model, transport=None, max_model_len=128, lora_rank=8, max_adapters=4, top_logprobs=128)
    with engine(values, worker=AdapterEngine) as handle:
        yield AdapterEngines([handle], deadline_s=DEADLINE_S)


@pytest.mark.timeout(3000)
async def test_ten_thousand_requests_cross_nothing(
    engines: AdapterEnginesRole, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six tenants share a real rank, which is lost now and then, and at first has room for five adapters. Each tenant
    gets the same bytes alone, from ranks that are never lost; of a real engine the same tokens."""
    monkeypatch.setattr(training, "SAVE_AFTER_S", 2.0)
    count = int(os.environ.get("REQUESTS", "1667"))
    policy = WorkerAdapters(str(tiny_model))

    async def results(name: str, count: int, *, together: bool, room: int = 6) -> list[list[Answer]]:
        limits = {"max_length": 128, "checkpoint_bytes": 1 << 34, "max_adapters": room}
        server = TinkerServer(opened(tmp_path / name, policy, engines, **limits), [])
        made = TestServer(server.application())
        await made.start_server(auto_decompress=False)
        try:
            return await run_tenants(str(made.make_url("")), MODEL, TENANTS, count, together=together)
        finally:
            await made.close()

    try:
        policy.dies = now_and_then(count, 2 * count)
        moved = await results("beside", count // 20, together=True, room=5)
        beside = await results("beside", count - count // 20, together=True)
        policy.dies = lambda: False
        alone = await results("alone", count - count // 20, together=False)
    finally:
        policy.close()
    print(len(policy.deaths), sum(map(len, (*moved, *beside))), sorted(kinds(beside).items()))  # noqa: T201
    rounded = [ours.difference(theirs) for ours, theirs in differing(beside, alone, tolerance=0.0)]
    print(len(rounded), max(rounded, default=0.0))  # noqa: T201
    assert len(policy.deaths) > 3
    tolerance = 0.0 if isinstance(engines, EchoEngines) else 1e-5
    assert differing(beside, alone, tolerance=tolerance) == []
    begin = [answers[: len(first)] for answers, first in zip(alone, moved, strict=True)]
    assert differing(moved, begin, tolerance=tolerance) == []
    assert all(kinds(beside)[kind, True] > count // 20 for kind in ("train", "forward", "step", "load", "sample"))


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_ten_kills_of_the_server_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """Four tenants go on while the process of the server is killed. They get the results of a quiet server."""
    server, count = Server(tmp_path), int(os.environ.get("REQUESTS", "150"))
    model = str(next((tmp_path / "served" / "service").glob("**/config.json")).parent)
    try:
        quiet = asyncio.run(run_tenants(server.url, model, TENANTS[:4], count, together=True))
        alone = asyncio.run(run_tenants(server.url, model, TENANTS[:4], count // 3, together=False))
        killed, kills = asyncio.run(with_kills(server, model, count, between=sum(map(len, quiet)) // 11))
    finally:
        server.end(signal.SIGTERM)
    print(kills, sorted(kinds(killed).items()))  # noqa: T201
    assert kills == 10
    assert differing(killed, quiet) == []
    assert differing([answers[: len(again)] for answers, again in zip(quiet, alone, strict=True)], alone) == []


async def with_kills(server: Server, model: str, count: int, *, between: int) -> tuple[list[list[Answer]], int]:
    """Kill the server at random moments, after each `between` results. Return the results, and the number of kills."""
    seen, kills, rng = 0, list[asyncio.Task[None]](), random.Random(1)

    def kill() -> None:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
        server.start()

    async def kill_soon() -> None:
        await asyncio.sleep(rng.random())
        await asyncio.to_thread(kill)

    def count_result() -> None:
        nonlocal seen
        seen += 1
        if seen % between == 0 and len(kills) < 10 and all(task.done() for task in kills):
            kills.append(asyncio.create_task(kill_soon()))

    results = await run_tenants(server.url, model, TENANTS[:4], count, together=True, seen=count_result)
    await asyncio.gather(*kills)
    return results, len(kills)
