"""Tell a loop to end soon: the loop saves the finished work and returns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Notice:
    """A flag set once, in the thread of the loop, and never cleared."""

    def __init__(self) -> None:
        self._given = asyncio.Event()

    @property
    def is_given(self) -> bool:
        return self._given.is_set()

    def give(self) -> None:
        self._given.set()

    async def unless_given(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return the result of resumable work. None: the notice came first, and the work is cancelled."""
        done, notice = asyncio.ensure_future(work), asyncio.ensure_future(self._given.wait())
        try:
            await asyncio.wait({done, notice}, return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else None
        finally:
            done.cancel()
            notice.cancel()
            await asyncio.gather(done, notice, return_exceptions=True)
