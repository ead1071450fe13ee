"""Start the requests of a batch in one engine step, in an order independent of their arrival.

The composition of every engine step then depends only on the requests and the weights. This fixes every bit of every
log-probability.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_thread import Submission
from rlhf.errors import RunError


class HeldRequests:
    """The entrance of an engine, open except from `hold` to `release`."""

    def __init__(self, calls: EngineCalls) -> None:
        self.calls = calls
        self.loop = calls.loop
        self._held: list[tuple[int, list[Submission], asyncio.Future[list[Future[Any]]]]] | None = None
        self._refused: list[RunError] = []  # one error for each group refused since `hold`
        self._arrived = asyncio.Event()

    def hold(self) -> None:
        """Hold back all later requests."""
        self._held, self._refused = [], []

    async def admit(self, group_id: int, submissions: list[Submission]) -> list[Future[Any]]:
        """Give a group's samples to the engine, after `release` if requests are held."""
        if self._held is None:
            return self.loop.submit(submissions)
        started: asyncio.Future[list[Future[Any]]] = asyncio.get_running_loop().create_future()
        self._held.append((group_id, submissions, started))
        self._arrived.set()
        return await self.calls.within(started, f"the release of group {group_id}")

    def refuse(self, group_id: int, error: Exception) -> None:
        """Tell `release` that a group never arrives."""
        self._refused.append(RunError(f"{self.loop.name}: group {group_id}: {error}"))
        self._arrived.set()

    async def release(self, num_groups: int) -> None:
        """Wait until `num_groups` groups have arrived since `hold`, then start all in one step, by group id and sample.

        RunError if a group was refused or did not arrive. All arrived groups then get the same error.
        """
        held, refused, limit_s = self._held, self._refused, self.calls.deadline_s
        if held is None:
            raise RunError(f"{self.loop.name}: `release` was called without `hold`")
        try:
            async with asyncio.timeout(limit_s):
                while len(held) + len(refused) < num_groups:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            few = f"{self.loop.name}: only {len(held)} of {num_groups} groups arrived within {limit_s:.0f} s"
            refused.append(RunError(few))
        self._held = None
        if refused:
            for _, _, started in held:
                if not started.done():  # otherwise the `admit` of this group has given up
                    started.set_exception(refused[0])
            raise refused[0]
        held.sort(key=lambda entry: entry[0])
        futures = iter(self.loop.submit([sample for _, samples, _ in held for sample in samples]))
        for _, samples, started in held:
            started.set_result([next(futures) for _ in samples])
