"""Execute together all calls that wait at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")


class WaitingCalls(Generic[Call, Result]):
    """Calls that arrive while earlier calls run are executed together next. No call waits for a later call."""

    def __init__(
        self,
        carry_out: Callable[[Sequence[Call]], Awaitable[Sequence[Result | BaseException]]],
        *,
        fits: Callable[[Sequence[Call]], bool],
    ) -> None:
        """`carry_out` returns a result or an error for each call. `fits`: whether calls can go together."""
        self._carry_out, self._fits = carry_out, fits
        self._waiting: list[tuple[Call, asyncio.Future[Result]]] = []
        self._work: asyncio.Task[None] | None = None  # executes the calls, even if a caller is cancelled

    async def call(self, call: Call) -> Result:
        """Return the result of a call, or raise its error."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._carry_out_all())
        return await future

    async def _carry_out_all(self) -> None:
        while self._waiting:
            taken = self._taken()
            carried_out = self._carry_out([call for call, _ in taken])
            (results,) = await asyncio.gather(carried_out, return_exceptions=True)
            if isinstance(results, BaseException):
                results = [results] * len(taken)
            for (_, future), result in zip(taken, results, strict=True):
                if future.done():  # the caller no longer waits
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _taken(self) -> list[tuple[Call, asyncio.Future[Result]]]:
        """Take the first call, and the later calls that fit beside the calls taken so far."""
        taken: list[tuple[Call, asyncio.Future[Result]]] = []
        for entry in list(self._waiting):
            if not taken or self._fits([call for call, _ in (*taken, entry)]):
                taken.append(entry)
                self._waiting.remove(entry)
        return taken
