"""How many calls of agents the front of an engine takes, what it adds to a call's time, and whether its memory grows.

    python benchmarks/gateway.py [--sessions 256] [--calls 100000]

A dummy engine answers at once with 16 tokens, so all time is the front's. Each session holds a conversation of 5 calls,
which continue the sampled tokens, and then ends. The load is another process on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
from aiohttp import ClientSession, TCPConnector

from actors.serving.front import Front, FrontSpec, build_front
from actors.serving.front_engine import FrontEngine
from actors.serving.sessions import Sessions
from rlhf.agents.limits import SessionLimits
from rlhf.models.tiny import build_tiny_llama
from rlhf.types import Sampling
from tests.dummy_engine import DummyLoop, dummy_parts

CALLS = 5  # of a session
TOKENS = 16  # of a response


class Controlled:
    """The front's application, with three paths more: /open/KEY, /close/KEY and /memory."""

    def __init__(self, app: Any, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, verb, *rest = scope["path"].split("/")
        if verb not in ("open", "close", "memory"):
            return await self.app(scope, receive, send)
        told: Any = None
        if verb == "open":
            limits = SessionLimits(max_calls=CALLS, max_tokens=1024, seed=0)
            self.sessions.open(rest[0], Sampling(max_new_tokens=TOKENS), limits)
        elif verb == "close":
            calls = self.sessions.close(rest[0])
            told = [len(calls), sum(call.broke is not None or call.continues is None for call in calls)]
        else:
            own = psutil.Process()
            told = [own.memory_info().rss / 2**20, sum(own.cpu_times()[:2])]
        body = json.dumps(told).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


def serve(urls: Any) -> None:
    """Serve until the process is ended."""

    async def run() -> None:
        model = build_tiny_llama(Path(tempfile.mkdtemp()) / "tiny", seed=0)
        parts = dummy_parts(model)
        serial = itertools.count()

        def says(prompt: Any, params: Any) -> list[int]:
            number = next(serial)
            return [65 + (number >> shift) % 57 for shift in range(TOKENS)]

        loop = DummyLoop(parts.renderer.get_tokenizer(), says)
        engine = FrontEngine(loop, parts, ends=(), lora=lambda: None)
        sessions = Sessions(lambda prefix: loop.abort([prefix]))
        gateway = await build_front(engine, sessions, FrontSpec(name="dummy", template=None))
        loop.asked = _Forgetful()
        front = await Front.serve(Controlled(gateway, sessions), sessions, host="127.0.0.1")  # type: ignore[arg-type]
        urls.put(front.base_url)
        await asyncio.Event().wait()

    asyncio.run(run())


class _Forgetful(list[Any]):
    def append(self, item: Any) -> None:
        """Keep nothing."""


async def session(client: ClientSession, url: str, key: str, latencies: list[float]) -> None:
    """Hold one conversation."""
    await (await client.get(f"{url}/open/{key}")).read()
    messages: list[Any] = [{"role": "system", "content": "You are an agent. " * 10}]
    for number in range(CALLS):
        messages.append({"role": "user", "content": f"Result {number}: " + "x" * 50})
        began = time.perf_counter()
        answer = await client.post(
            f"{url}/v1/chat/completions",
            json={"model": "m", "messages": messages},
            headers={"Authorization": f"Bearer {key}"},
        )
        told = await answer.json()
        latencies.append(time.perf_counter() - began)
        assert answer.status == 200, told
        messages.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
    answer = await client.get(f"{url}/close/{key}")
    assert await answer.json() == [CALLS, 1], "a prefix broke"


async def load(url: str, *, sessions: int, calls: int) -> None:
    """Print the numbers."""
    async with ClientSession(connector=TCPConnector(limit=0)) as client:
        keys = (f"key{number}" for number in itertools.count())
        alone: list[float] = []
        for _ in range(40):
            await session(client, url, next(keys), alone)
        sys.stdout.write(f"one session at a time: median {1000 * statistics.median(alone):.2f} ms a call\n")

        async def work(left: list[int], latencies: list[float]) -> None:
            while left[0] > 0:
                left[0] -= CALLS
                await session(client, url, next(keys), latencies)

        rounds = max(1, calls // 20_000)
        for _ in range(rounds):
            latencies: list[float] = []
            _, before = await (await client.get(f"{url}/memory")).json()
            left, began = [calls // rounds], time.perf_counter()
            await asyncio.gather(*[work(left, latencies) for _ in range(sessions)])
            took = time.perf_counter() - began
            rss, after = await (await client.get(f"{url}/memory")).json()
            sys.stdout.write(
                f"{len(latencies)} calls, {sessions} sessions: {len(latencies) / took:.0f} calls/s, "
                f"median {1000 * statistics.median(latencies):.0f} ms; the front takes "
                f"{1000 * (after - before) / len(latencies):.2f} ms of a core a call, and {rss:.0f} MiB\n"
            )
            sys.stdout.flush()


def main() -> None:
    """Start the front in a process, and load it from this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--calls", type=int, default=100_000)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    urls = context.Queue()
    server = context.Process(target=serve, args=[urls], daemon=True)
    server.start()
    try:
        asyncio.run(load(urls.get(timeout=120), sessions=arguments.sessions, calls=arguments.calls))
    finally:
        server.kill()
        server.join()


if __name__ == "__main__":
    main()
