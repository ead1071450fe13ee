"""The notice that a run is to end soon: its loop keeps what is done, and ends by itself.

Who gives it, and how long the loop may take, is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Notice:
    """Given once, in the loop's own thread; never taken back."""

    def __init__(self) -> None:
        self._given = asyncio.Event()

    @property
    def is_given(self) -> bool:
        """Whether the run is to end."""
        return self._given.is_set()

    def give(self) -> None:
        """The run is to end."""
        self._given.set()

    async def unless_given(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of work that is of use later though it is cut off; None, with the work cancelled, if it is."""
        done, told = asyncio.ensure_future(work), asyncio.ensure_future(self._given.wait())
        try:
            await asyncio.wait({done, told}, return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else None
        finally:
            done.cancel()
            told.cancel()
            await asyncio.gather(done, told, return_exceptions=True)
