"""References to the results of remote calls, without Ray, and waits for other tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any


def ref(result: Any = None) -> Any:
    """Return a reference to a result. The wait for the result raises an exception, and waits for a future."""
    future = result if isinstance(result, Future) else Future[Any]()
    if isinstance(result, BaseException):
        future.set_exception(result)
    elif future is not result:
        future.set_result(result)
    return SimpleNamespace(future=lambda: future)


def method(call: Callable[..., Any]) -> Any:
    """Return a remote method: a call returns a reference to the result of this function."""
    return SimpleNamespace(remote=lambda *arguments, **options: ref(call(*arguments, **options)))


async def settle(turns: int = 50) -> None:
    """Let other tasks run until all tasks wait."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)
