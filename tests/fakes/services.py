"""HTTP services on a thread of this process."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def served(handler: Handler) -> Iterator[str]:
    """Serve every request by one handler. Yield the URL."""
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


class FakeService:
    """A service that records requests. The last reply, a status or a JSON value, repeats."""

    def __init__(self, *replies: Any, **options: Any) -> None:
        self.replies, self.options = replies, options
        self.requests: list[tuple[str, str | None, Any]] = []  # path, header Authorization, body

    async def __call__(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append((request.path, request.headers.get("Authorization"), body))
        return web.Response(status=reply, **self.options) if isinstance(reply, int) else web.json_response(reply)


class JudgeService:
    """A judge with an arbitrary and fixed opinion on each question, in the form of the request. It keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, request: web.Request) -> web.Response:
        if not request.can_read_body:
            return web.json_response({})
        body = await request.json()
        self.bodies.append(body)
        opinion = zlib.crc32(body["messages"][-1]["content"].encode())
        content = "Answer: " + "AB"[opinion % 2]
        if "response_format" in body:
            numbers = body["response_format"]["json_schema"]["schema"]["properties"]["scores"]["properties"]
            scores = {
                name: of["enum"][(opinion >> place) % len(of["enum"])]
                for place, (name, of) in enumerate(numbers.items())
            }
            content = json.dumps({"reasons": "because", "scores": scores})
        return web.json_response({"choices": [{"message": {"content": content}}]})


class TeacherService:
    """A server with vLLM's `prompt_logprobs`. `logprobs_of` returns the log-probabilities [n, V] of n tokens.

    Position t of its result predicts token t + 1. `tokenizer` reads prompts of text.
    """

    def __init__(
        self,
        tokenizer: Any,
        logprobs_of: Callable[[list[int]], Any],
        *,
        size: int,
        name: str = "m",
        longest: int | None = 10**6,
    ) -> None:
        self.tokenizer, self.logprobs_of, self.size, self.name = tokenizer, logprobs_of, size, name
        self.longest = longest  # None: the server does not say
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            card = {"id": self.name} | ({} if self.longest is None else {"max_model_len": self.longest})
            return web.json_response({"data": [{"id": "elsewhere", "max_model_len": 1}, card]})
        body = await request.json()
        self.bodies.append(body)
        ids, k = body["prompt"], body["prompt_logprobs"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids, add_special_tokens=body["add_special_tokens"]).input_ids
        if body["model"] != self.name:
            return web.json_response({"error": {"message": f"there is no model {body['model']}"}}, status=404)
        if max(ids) >= self.size:
            message = {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}}
            return web.json_response(message, status=400)
        entries: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], self.logprobs_of(ids), strict=False):
            best = {other: rank for rank, other in enumerate(row.topk(k).indices.tolist(), 1)}
            shown = {token: int((row >= row[token]).sum())} | best
            entries.append({str(t): {"logprob": float(row[t]), "rank": rank} for t, rank in shown.items()})
        return web.json_response({"choices": [{"prompt_logprobs": entries}]})
