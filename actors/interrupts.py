"""SIGTERM: what ends a run that could go on elsewhere, as Kubernetes, batch systems and spot machines send it.

A run in its loop is given time to keep what is done; whatever else runs ends as at Ctrl-C, in order. Also where it goes
to all processes of the run at once, as `timeout`, Slurm and systemd send it. It must not delay a second signal.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from actors.cluster import OWN_RAY
from rlhf.controller.notice import Notice
from rlhf.errors import Preempted, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SAME_S = 2.0  # `timeout` sends two, to the process and to its group
LOOK_EVERY_S = 0.2
ASK_EVERY_S = 5.0  # for nodes that are soon to go
LET_GO_WITHIN_S = 5.0  # of what a loop had begun


@dataclass(slots=True)
class Sigterm:
    """The first one, or what counts as one: when it came, on the monotonic clock, and whether a loop is there that ends
    by itself."""

    came: float | None = None
    why: str = "SIGTERM"
    is_heeded: bool = False
    listen: Callable[[], object] = lambda: None  # again, after a library that listens itself, as `ray.init` does

    def refuse_more(self) -> None:
        """Preempted if it came: what comes next is not begun."""
        if self.came is not None:
            raise Preempted("what was begun is done")


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends what runs as Ctrl-C does: in order.

    The first one does; those that follow would only disturb the end.
    """
    with _handling(lambda _, frame: _interrupt(frame)):
        yield


@contextmanager
def sigterm_preempts() -> Iterator[Sigterm]:
    """SIGTERM tells a loop that is `heeding` it to end, and interrupts whatever else runs. A second signal of any kind
    interrupts the loop too. Preempted is raised instead of what the end looks like."""
    told = Sigterm()
    first: float | None = None

    def hear(_: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and now - first < SAME_S:
            return
        is_first, first, told.came = first is None, first or now, told.came or now
        if not (is_first and told.is_heeded):
            _interrupt(frame)

    with _handling(hear) as told.listen:
        try:
            yield told
        except KeyboardInterrupt:
            if told.came is None:
                raise
            raise Preempted("what was at work is given up") from None
        except (UserError, Preempted):
            raise
        except Exception as error:
            if told.came is None:
                raise
            raise Preempted(f"what was at work failed meanwhile: {error}") from error


async def heeding(
    work: Coroutine[Any, Any, T],
    notice: Notice,
    told: Sigterm,
    *,
    grace_s: float,
    leaving: Callable[[], Awaitable[tuple[str, float | None] | None]],
) -> T:
    """A loop's work, which ends by itself when it has been given notice; grace_s later it is cut off. Its result.

    leaving: looks for a node of the run that is soon to go, which is a notice as SIGTERM is; and when it goes.
    """
    task = asyncio.ensure_future(work)
    told.is_heeded = True
    asked = time.monotonic()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_EVERY_S)
            now = time.monotonic()
            if told.came is None and now - asked >= ASK_EVERY_S:
                asked = now
                if (going := await leaving()) is not None:
                    told.came, told.why = now, f"node {going[0]} is told to go"
                    if going[1] is not None:
                        grace_s = min(grace_s, going[1] - time.time())
            if told.came is None or task.done():
                continue
            if not notice.is_given:
                logger.warning("%s: the run keeps what is done and ends, within %.0f s", told.why, grace_s)
                notice.give()
            if OWN_RAY.is_ending:
                OWN_RAY.kill()
                raise Preempted("what was at work is given up, since the run's own Ray was told to end too")
            if time.monotonic() - told.came > grace_s:
                raise Preempted(f"the step at work was not done in {grace_s:g} s (train.preemption_grace_s, or less)")
        return await task
    finally:
        told.is_heeded = False
        task.cancel()
        await asyncio.wait({task}, timeout=LET_GO_WITHIN_S)


@contextmanager
def _handling(hear: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], object]]:
    """SIGTERM is heard so; what is yielded has it heard so again. Only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield lambda: signal.signal(signal.SIGTERM, hear)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(frame: FrameType | None) -> None:
    """What Ctrl-C does; also where SIGINT is ignored, as shells have it for commands in the background."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)
    try:
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
    finally:  # second, so that no call that fails of it comes before the interrupt
        OWN_RAY.kill()
