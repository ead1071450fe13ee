"""How many calls of agents the front of an engine takes, what it adds to a call's time, and whether its memory grows.

    python benchmarks/gateway.py [--sessions 256] [--calls 100000] [--delayed-calls 15000]

A dummy engine answers with 16 tokens. Each session holds a conversation of 5 calls, which continue the sampled tokens,
and then ends. The load is another process on the same machine.

First the engine answers at once, and the machine is saturated: this measures the throughput. The time of a call means
nothing then, because calls wait in a queue. Then the engine answers after a fixed delay, and sessions pause between
calls as agents do. The time of a call minus the delay is the time that the front and the client add.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import uvloop
from aiohttp import ClientSession, TCPConnector

from actors.serving.captured_sessions import CapturedSessions
from actors.serving.front import Front, FrontSpec, build_front
from actors.serving.front_engine import FrontEngine
from rlhf.agents.limits import SessionLimits
from rlhf.agents.trees import training_sequences
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.types import Sampling
from tests.dummy_engine import DummyLoop, dummy_parts

CALLS = 5  # of a session
DELAY_S = 0.5  # delay of the engine, and mean pause of an agent between two calls
TOKENS = 16  # of a response


class DelayedLoop(DummyLoop):
    """Answers each request after `delay_s`, or at once."""

    delay_s = 0.0

    def _answer(self, submission: Any, future: Any) -> None:
        answer = super()._answer
        if self.delay_s:
            asyncio.get_running_loop().call_later(self.delay_s, answer, submission, future)
        else:
            answer(submission, future)


class Controlled:
    """The front's application, with four paths more: /open/KEY, /close/KEY, /memory and /delay/SECONDS."""

    def __init__(self, app: Any, sessions: CapturedSessions, engine: DelayedLoop) -> None:
        self.app = app
        self.sessions = sessions
        self.engine = engine

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, verb, *rest = scope["path"].split("/")
        if verb not in ("open", "close", "memory", "delay"):
            return await self.app(scope, receive, send)
        told: Any = None
        if verb == "open":
            limits = SessionLimits(max_calls=CALLS, max_tokens=1024, seed=0)
            self.sessions.open(rest[0], Sampling(max_new_tokens=TOKENS), limits)
        elif verb == "close":
            calls = self.sessions.close(rest[0])
            told = [len(calls), len(training_sequences(calls))]
        elif verb == "delay":
            self.engine.delay_s = float(rest[0])
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

        loop = DelayedLoop(parts.renderer.get_tokenizer(), says)
        engine = FrontEngine(loop, parts, ends=(), lora=lambda: None)
        sessions = CapturedSessions(lambda prefix: loop.abort([prefix]))
        gateway = await build_front(engine, sessions, FrontSpec(name="dummy", template=None))
        loop.asked = _Forgetful()
        gc.collect()
        gc.freeze()  # as in an engine
        front = await Front.serve(Controlled(gateway, sessions, loop), sessions, host="127.0.0.1")  # type: ignore[arg-type]
        urls.put(front.base_url)
        await asyncio.Event().wait()

    uvloop.run(run())  # as Ray's actors


class _Forgetful(list[Any]):
    def append(self, item: Any) -> None:
        """Discard the captured calls."""


async def session(client: ClientSession, url: str, key: str, latencies: list[float], *, pause_s: float = 0.0) -> None:
    """Hold one conversation, with a random pause before each call."""
    await (await client.get(f"{url}/open/{key}")).read()
    messages: list[Any] = [{"role": "system", "content": "You are an agent. " * 10}]
    for number in range(CALLS):
        messages.append({"role": "user", "content": f"Result {number}: " + "x" * 50})
        if pause_s:
            await asyncio.sleep(random.uniform(0.0, 2.0 * pause_s))
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


async def load(url: str, *, sessions: int, calls: int, delayed_calls: int) -> None:
    """Run both measurements, and print the numbers."""
    async with ClientSession(connector=TCPConnector(limit=0)) as client:
        keys = (f"key{number}" for number in itertools.count())
        alone: list[float] = []
        for _ in range(40):
            await session(client, url, next(keys), alone)
        sys.stdout.write(f"one session at a time: median {1000 * statistics.median(alone):.2f} ms a call\n")

        async def many(num_calls: int, pause_s: float) -> list[float]:
            """Hold conversations in all sessions, print their rate and cost, and return the time of each call."""
            latencies: list[float] = []
            left = [num_calls]

            async def work() -> None:
                while left[0] > 0:
                    left[0] -= CALLS
                    await session(client, url, next(keys), latencies, pause_s=pause_s)

            _, before = await (await client.get(f"{url}/memory")).json()
            began = time.perf_counter()
            await asyncio.gather(*[work() for _ in range(sessions)])
            took = time.perf_counter() - began
            rss, after = await (await client.get(f"{url}/memory")).json()
            sys.stdout.write(
                f"{len(latencies)} calls, {sessions} sessions: {len(latencies) / took:.0f} calls/s; the front takes "
                f"{1000 * (after - before) / len(latencies):.2f} ms of a core a call, and {rss:.0f} MiB\n"
            )
            sys.stdout.flush()
            return latencies

        rounds = max(1, calls // 20_000)
        for _ in range(rounds):
            await many(calls // rounds, 0.0)
        await (await client.get(f"{url}/delay/{DELAY_S}")).read()
        added = sorted(1000 * (latency - DELAY_S) for latency in await many(delayed_calls, DELAY_S))
        sys.stdout.write(
            f"an engine that answers after {DELAY_S} s: a call takes {statistics.median(added):.1f} ms more (median), "
            f"{added[len(added) * 95 // 100]:.1f} ms (95 %)\n"
        )


def main() -> None:
    """Start the front in a process, and load it from this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--delayed-calls", type=int, default=15_000)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    urls = context.Queue()
    server = context.Process(target=serve, args=[urls], daemon=True)
    server.start()
    try:
        numbers = {"sessions": arguments.sessions, "calls": arguments.calls, "delayed_calls": arguments.delayed_calls}
        uvloop.run(load(urls.get(timeout=300), **numbers))
    finally:
        server.kill()
        server.join()


if __name__ == "__main__":
    main()
