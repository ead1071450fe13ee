"""Wait for an engine's thread from coroutines, with a deadline and an error that names the awaited operation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from actors.cluster.waiting import within
from actors.rollout.engine_thread import EngineLoop
from rlhf.errors import RunError

T = TypeVar("T")


class EngineCalls:
    """Calls into the thread of one engine. RunError names the awaited operation after the deadline."""

    def __init__(self, loop: EngineLoop, *, deadline_s: float) -> None:
        self.loop = loop
        self.deadline_s = deadline_s

    async def run(self, work: Callable[[Any], T], operation: str, deadline_s: float | None = None) -> T:
        """Return the result of `work(engine)`, run between two steps."""
        return await self.wait(self.loop.call(work), operation, deadline_s)

    async def wait(self, future: Future[T], operation: str, deadline_s: float | None = None) -> T:
        return await self.within(asyncio.wrap_future(future), operation, deadline_s)

    async def within(self, awaitable: Awaitable[T], operation: str, deadline_s: float | None = None) -> T:
        limit = self.deadline_s if deadline_s is None else deadline_s
        try:
            return await within(awaitable, limit)
        except TimeoutError as error:
            raise RunError(
                f"{self.loop.name}: waited {limit:.0f} s for {operation}; {self.loop.num_waiting} requests in flight, "
                f"last step {time.monotonic() - self.loop.last_step:.0f} s ago"
            ) from error
