"""Decide on the loss of a worker: start the worker again, or end the run with the error of the loss.

The groups of actors notice losses and know how to replace a worker. This module counts, decides and records. The run
ends when a unit was lost more often than `cluster.restarts` allows, and when memory was exhausted twice. The run also
ends when the same worker was lost twice in a row at the same work, because a bug is then the likely cause.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Sequence
from typing import Protocol

from rlhf.config.schema.cluster import Restarts
from rlhf.errors import NodeNotReplaced, Preempted, RunError, StorageFull, WorkerLost
from rlhf.process.driver_parent import DriverDeath
from rlhf.role_table import ROLES, Role, RoleKind
from rlhf.roles import Metrics
from rlhf.tracking.metrics.reductions import Sum
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.tracking.sinks.tracker import Tracker

logger = logging.getLogger(__name__)
DRIVER = "driver"
ITS_START = "its start"  # the work of a worker that is lost before any work
UNITS: dict[RoleKind, str] = {"engines": "engine", "trained": "gang", "frozen": "worker", "scoring": "worker"}


class LossRecord(Protocol):
    """The record of a run, or of a server."""

    step: int
    tracker: Tracker
    timeline: Timeline


class Supervisor:
    """The losses of a run."""

    def __init__(
        self, restarts: Restarts, record: LossRecord, roles: Iterable[Role], *, finds_causes: bool = False
    ) -> None:
        """Begin to count. `finds_causes`: the caller finds and refuses work that exhausts the memory every time."""
        self.restarts, self.record, self._roles = restarts, record, tuple(roles)
        self._finds_causes = finds_causes
        self._losses: dict[str, list[tuple[float, WorkerLost]]] = {}  # in the window, by the unit with a common limit
        self._last_work: dict[tuple[Role, int], Hashable] = {}  # at the last loss, if nothing succeeded since
        self._out_of_memory: set[Role] = set()
        self.recovered: Counter[str] = Counter()  # restarts by role since the last `metrics`
        self.recovery_s = 0.0  # the same, in seconds

    async def recover(self, lost: WorkerLost, rebuild: Callable[[], Awaitable[None]], *, work: Hashable = None) -> None:
        """Start the lost worker again by `rebuild`, and record the loss. Raise the loss itself if the run must end.

        Raise Preempted if no node takes the place of a lost node in time: on new nodes the run can continue. A
        successor lost before its first work is started again in the same way. `work` is the worker's task, if known:
        the run ends after a second loss at the same task without a call of `succeeded` in between.
        """
        while True:
            try:
                return await self._recover_once(lost, rebuild, work)
            except WorkerLost as again:
                if again is lost or again.role != lost.role:
                    raise
                lost, work = again, ITS_START

    async def _recover_once(self, lost: WorkerLost, rebuild: Callable[[], Awaitable[None]], work: Hashable) -> None:
        role: Role = lost.role  # type: ignore[assignment]
        count = self._allow(role, lost, work)
        unit, source, message = UNITS[ROLES[role].kind], f"{role} {lost.rank}", lost.reason
        limit, step = getattr(self.restarts, unit), self.record.step + 1
        logger.warning("%s It is started again (%d of at most %d, cluster.restarts.%s).", message, count, limit, unit)
        self.record.tracker.log_error(
            ErrorRecord(step=step, stage=lost.stage, kind=lost.kind, message=message, source=source, stack=lost.stack)
        )
        self.record.tracker.alert("warning", f"{role} lost", f"Step {step}: {message}")
        self.recovered[role] += 1
        began = time.perf_counter()
        with self.record.timeline.span("recovery", role):
            try:
                await rebuild()
            except WorkerLost:
                raise
            except NodeNotReplaced as error:  # the scheduler of the run may find another
                raise Preempted(f"{message} {error}") from error
            except RunError as error:
                kind = StorageFull if isinstance(error, StorageFull) else RunError  # Preempted has another exit code
                raise kind(f"{message} Its successor could not be started: {error}") from error
        took_s = time.perf_counter() - began
        self.recovery_s += took_s
        logger.info("%s works again after %.1f s", source, took_s)

    def succeeded(self, role: Role, rank: int) -> None:
        """Record that a worker finished work. The worker's next loss then does not count as a second loss at the same
        work."""
        self._last_work.pop((role, rank), None)

    def forgive(self, losses: Collection[WorkerLost]) -> None:
        """Forget the given losses: the work caused the losses, and not the worker."""
        for counted, earlier in self._losses.items():
            self._losses[counted] = [(at, lost) for at, lost in earlier if lost not in losses]

    def continue_after(self, deaths: Sequence[DriverDeath]) -> None:
        """Record the deaths of earlier drivers, in the driver that continues the run."""
        step, tracker = self.record.step + 1, self.record.tracker
        for death in deaths:
            tracker.log_error(
                ErrorRecord(step=step, stage=DRIVER, kind=death.kind, message=death.message, source=DRIVER)
            )
        if deaths:
            now, died_at = time.time(), deaths[-1].at
            tracker.alert("warning", f"{DRIVER} lost", deaths[-1].message)
            self.record.timeline.record("recovery", "controller", start_s=died_at, end_s=now)
            self.recovered["controller"] += len(deaths)
            self.recovery_s += now - died_at
            logger.info("the run continues %.1f s after the death of its driver", now - died_at)

    def _allow(self, role: Role, lost: WorkerLost, work: Hashable) -> int:
        """Return the number of losses in the window, or raise the loss."""
        now, unit = time.monotonic(), UNITS[ROLES[role].kind]
        counted = unit if unit == "gang" else role  # the loss of any rank restarts the whole gang
        losses = [(at, other) for at, other in self._losses.get(counted, []) if now - at <= self.restarts.window_s]
        self._losses[counted] = losses = [*losses, (now, lost)]
        key, last_work = (role, lost.rank), self._last_work.get((role, lost.rank))
        self._last_work[key] = work
        reason = None
        if len(losses) > getattr(self.restarts, unit):
            who = "a trained rank" if unit == "gang" else "it"
            reason = f"{who} was lost {len(losses)} times in {self.restarts.window_s:.0f} s (cluster.restarts.{unit})"
        elif lost.kind == "out_of_memory" and role in self._out_of_memory and not self._finds_causes:
            reason = "its memory was exhausted twice"
        elif work is not None and work == last_work:
            reason = "the worker was lost twice in a row at the same work"
        if reason is not None:
            logger.error("%s %d is not started again: %s", role, lost.rank, reason)
            raise lost
        if lost.kind == "out_of_memory":
            self._out_of_memory.add(role)
        return len(losses)

    def metrics(self) -> Metrics:
        """Return the recoveries since the last call."""
        counts = {f"recovery/{role}/total": Sum(total=self.recovered[role]) for role in (*self._roles, "controller")}
        seconds, self.recovery_s = self.recovery_s, 0.0
        self.recovered.clear()
        return {**counts, "time/recovery_s": Sum(total=seconds)}
