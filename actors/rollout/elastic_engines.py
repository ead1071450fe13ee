"""Let engines join and leave during a run, for a range of engines in the configuration.

    no engine -> room -> started -> given the weights -> proved -> open        joins
    open -> closed -> ended -> room given back -> no engine                    leaves

Each rank up to the largest number has an engine, or waits for room with a request to Ray for a separate placement
group. A new engine gets and proves weights like the successor of a lost engine. An engine leaves a draining node; the
remaining engines take the unfinished groups. A lost engine is replaced if there is room within
`cluster.start_timeout_s`; otherwise the rank waits for room again. If fewer engines than the smallest number are left,
the run is preempted. An engine that cannot start is started again later, if the run can continue without this engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Hashable
from typing import Any, cast

from actors.cluster.actor_locations import draining_nodes
from actors.cluster.connect import OWN_RAY
from actors.cluster.placement import NoRoom, Seats
from actors.rollout.replaceable_engines import ReplaceableEngines
from rlhf.errors import RESUMES, Preempted, RunError, UserError, WorkerLost

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 5.0  # interval of the check for draining nodes
START_AGAIN_AFTER_S = 60.0  # doubled after each failed start
LONGEST_WAIT_S = 3600.0


class CannotStart(RunError):
    """An engine could not start on a node, and the run can continue without this engine."""


class ElasticEngines(ReplaceableEngines):
    """A fixed number of engines, or engines that join and leave, each in a seat (Seats)."""

    _joining: frozenset[int] = frozenset()  # ranks without an engine, which wait for room
    _watch: asyncio.Task[None] | None = None

    @property
    def seats(self) -> Seats:
        assert self.placement is not None
        assert self.placement.seats is not None
        return self.placement.seats

    @property
    def num_working(self) -> int:
        return len(self.handles) - len(self._rebuilds)

    def grow(self) -> None:
        """Begin to look for room for more engines, and for draining nodes."""
        if not self.is_elastic:
            return
        self._watch = asyncio.create_task(self._leave_drained_nodes())
        self._watch.add_done_callback(_log_failure)
        for rank in range(len(self.handles), self.seats.engines.max):
            self.handles.append(cast("Any", None))
            self.unanswered.append(set())
            self._rebuild(rank, self._join(rank))

    async def _restart(self, rank: int) -> None:
        if not self.is_elastic:
            await super()._restart(rank)
            return
        if self.handles[rank] is not None:
            await self.processes.end_one(rank)
        is_joining = rank in self._joining
        await self.seats.take(rank, limit_s=None if is_joining else self.start_deadline_s)
        self._joining -= {rank}
        try:
            await self._start_one(rank, ends=time.monotonic() + self.start_deadline_s)
        except (RunError, UserError) as error:  # UserError: the first engines could start, so the node differs
            is_counted = isinstance(error, WorkerLost)  # the supervisor counts losses, and decides what follows
            may_wait = is_joining or (self.num_working >= self.seats.engines.min and not is_counted)
            if OWN_RAY.is_ending or not may_wait:
                raise
            await self.processes.end_one(rank)
            self.seats.give_back(rank)
            raise CannotStart(str(error).removesuffix(f" {RESUMES}")) from error

    async def _recover(self, rank: int, lost: WorkerLost, work: Hashable) -> None:
        await self._or_without(rank, super()._recover(rank, lost, work))

    async def _or_without(self, rank: int, replacing: Coroutine[Any, Any, None]) -> None:
        """Wait until an engine is replaced. If there is no room, and enough engines are left, wait for room.

        Raise Preempted if too few are left: when the cluster has room again, the run can continue.
        """
        try:
            await replacing
        except RunError as error:
            reason = next((one for one in (error, error.__cause__) if isinstance(one, NoRoom | CannotStart)), None)
            if not self.is_elastic or reason is None:
                raise
            least = self.seats.engines.min
            if self.num_working < least:
                few = f"{self.num_working} engines are left, fewer than cluster.roles.rollout.engines.min: {least}"
                raise Preempted(f"{error}\n{few}") from error
            why = "has no room" if isinstance(reason, NoRoom) else f"cannot start ({reason})"
            logger.warning("rollout engine %d %s: the run continues with %d engines", rank, why, self.num_working)
            await self._join(rank)

    async def _join(self, rank: int) -> None:
        """Wait for room without a limit, and start an engine there. After a failed start, wait and try again."""
        wait_s = START_AGAIN_AFTER_S
        while True:
            self._joining |= {rank}
            try:
                await self._fill(rank)
                break
            except CannotStart as error:
                text = (
                    "rollout engine %d cannot start: the run continues with %d engines, and tries again in %.0f s: %s"
                )
                logger.warning(text, rank, self.num_working, wait_s, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2.0 * wait_s, LONGEST_WAIT_S)
        logger.info("rollout engine %d has joined", rank)

    async def _fill(self, rank: int) -> None:
        """Start an engine for a rank, and start again if the engine is lost during the start."""
        try:
            await self._replace(rank)
        except WorkerLost as lost:
            await self._recover(rank, lost, None)

    async def _leave_drained_nodes(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            going, nodes = await draining_nodes(), self.seats.nodes()
            for rank in [rank for rank, node in nodes.items() if node in going]:
                await self._is_published.wait()  # an engine must not end during a broadcast
                self._leave(rank)

    def _leave(self, rank: int) -> None:
        """End an engine on a draining node, and look for room elsewhere."""
        if rank in self._rebuilds or not (self.gives_published or self.num_working > 1):
            return  # with broadcasts, the last engine could not be replaced
        logger.warning("rollout engine %d leaves its node, which is being drained", rank)
        if self._dispatch is not None:
            self._dispatch.close(rank)
        self._rebuild(rank, self._or_without(rank, self._fill(rank)))

    async def give_up_rebuilds(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await super().give_up_rebuilds()

    def end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().end()


def _log_failure(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and watch.exception() is not None:
        logger.error("engines no longer leave nodes that are drained", exc_info=watch.exception())
