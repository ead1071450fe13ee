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
