"""Engines for a server: each request goes to the engine with the fewest requests and joins its running batch.

In training, the engines begin a batch together; here no request waits for another. How a response is rounded therefore
depends on the requests in flight at the same time. A dead engine gets no more requests.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.cluster.waiting import wait_one
from rlhf.errors import RESUMES, RunError
from rlhf.rollouts.records.spans import Sampled
from rlhf.types import GroupRequest, Prompt, Rollouts, Sampling

logger = logging.getLogger(__name__)

LOOKS_WITHIN_S = 10.0


class NoEngine(RunError):
    """Raised when all engines are dead."""


class RequestRouter:
    """Started, frozen engines. Use them on one event loop; the caller's deadline ends a wait."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, deadline_s: float) -> None:
        self.handles = handles
        self.deadline_s = deadline_s
        self.in_flight = [0] * len(handles)
        self.dead: dict[int, str] = {}
        self._ids = itertools.count()

    async def answer(self, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """Return one response for each seed. If the first engine dies, another one answers.

        NoEngine: all engines are dead. RunError: an engine fails on the request and lives. A cancelled wait drops the
        rest of the request.
        """
        while True:
            engine = self._least_busy()
            try:
                return await self._generate(engine, prompt, seeds, sampling)
            except RunError:
                why = await self._death(engine)
                if why is None:
                    raise
                logger.error("%s", why)
                self.dead[engine] = why

    async def trouble(self) -> str | None:
        """Return the reason why no engine answers any more. None: some engine does."""
        for engine in range(len(self.handles)):
            if engine not in self.dead and (why := await self._death(engine)) is not None:
                self.dead[engine] = why
        return " ".join(self.dead.values()) if len(self.dead) == len(self.handles) else None

    def _least_busy(self) -> int:
        alive = [engine for engine in range(len(self.handles)) if engine not in self.dead]
        if not alive:
            raise NoEngine(" ".join(self.dead.values()))
        return min(alive, key=lambda engine: self.in_flight[engine])

    async def _generate(self, engine: int, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        handle, group_id = self.handles[engine], next(self._ids)
        request = GroupRequest(group_id=group_id, prompt=prompt, seeds=tuple(seeds), first_sequence_id=0)
        self.in_flight[engine] += 1
        try:
            rollouts, infos = handle.generate.options(num_returns=2).remote(request, sampling)
            finished = await wait_one(infos, role="rollout", rank=engine, stage="serve", deadline_s=self.deadline_s)
            drawn: Rollouts = await wait_one(
                rollouts, role="rollout", rank=engine, stage="serve", deadline_s=self.deadline_s
            )
        except (asyncio.CancelledError, RunError):
            handle.cancel.remote([group_id])
            raise
        finally:
            self.in_flight[engine] -= 1
        return [_response(drawn.take([index]), info.finish_reason) for index, info in enumerate(finished)]

    async def _death(self, engine: int) -> str | None:
        """Return the reason why an engine will never answer again. None: it may."""
        handle = self.handles[engine]
        try:
            health = await wait_one(
                handle.health.remote(), role="rollout", rank=engine, stage="serve", deadline_s=LOOKS_WITHIN_S
            )
        except RunError as error:
            return _of_a_server(error) if isinstance(error.__cause__, RayActorError) else None
        return None if health.failure is None else _of_a_server(health.failure)


def _response(rollouts: Rollouts, finish_reason: Any) -> Sampled:
    mask = rollouts.response_mask
    return Sampled(
        token_ids=tuple(rollouts.token_ids[mask].tolist()),
        logprobs=tuple(rollouts.rollout_logprobs[mask].tolist()),
        versions=tuple(rollouts.versions[mask].tolist()),
        finish_reason=finish_reason,
    )


def _of_a_server(error: object) -> str:
    """Return an engine's error without advice about resuming a run, for a server."""
    return str(error).replace(f" {RESUMES}", "")
