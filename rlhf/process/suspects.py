"""Find the call that ends a worker, such as a group of responses to score, or a client's request.

A worker may be lost by chance, or because of a call. So each call in progress at a loss is made again, alone. If the
worker is lost once more, the call that was alone is the cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rlhf.errors import WorkerLost

T = TypeVar("T")


class CallLost(Exception):
    """A call was lost with a worker, since replaced. `losses` are the worker's losses in order."""

    def __init__(self, *losses: WorkerLost) -> None:
        super().__init__(str(losses[-1]))
        self.losses = losses


class Suspects:
    """The calls of one worker: concurrent, or alone after a loss."""

    def __init__(self) -> None:
        self._working = 0  # calls side by side
        self._suspects = 0  # calls to be made again, and the one that is made again
        self._idle, self._cleared = asyncio.Event(), asyncio.Event()
        self._alone = asyncio.Lock()
        self.caused: list[WorkerLost] = []  # losses by calls that were lost for good, until the worker works again

    def take_caused(self) -> list[WorkerLost]:
        """Return the losses whose cause was a call, each once. Call this method when the worker has finished a call."""
        caused, self.caused = self.caused, []
        return caused

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a call. Repeat a lost call alone. CallLost, with both losses: it was lost again."""
        while self._suspects:
            await self._cleared.wait()
        self._working += 1
        self._idle.clear()
        try:
            return await attempt()
        except CallLost as lost:
            first = lost.losses
            self._suspects += 1
            self._cleared.clear()
        finally:
            self._working -= 1
            if not self._working:
                self._idle.set()
        try:
            async with self._alone:
                while self._working:
                    await self._idle.wait()
                try:
                    return await attempt()
                except CallLost as again:
                    self.caused += (*first, *again.losses)
                    raise CallLost(*first, *again.losses) from again
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._cleared.set()
