"""Run a training loop under a stop request: finish the step, write a checkpoint and end, in a limited time.

The request comes from a signal (rlhf.process.stopping) or from a draining node. `timeout`, Slurm and systemd may send
a signal to all processes of the run at once. Then Ray's daemons end too, and nothing can be saved. If the daemons end
without a request, an error ends the loop at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from actors.cluster.connect import OWN_RAY
from rlhf.controller.notice import Notice
from rlhf.errors import RESUMES, Preempted, RunError
from rlhf.process.driver_parent import tell_parent
from rlhf.process.stopping import StopRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")
DrainingNode = Callable[[], Awaitable[tuple[str, float | None] | None]]

LOOK_EVERY_S = 0.2
TOLD_WITHIN_S = 1.0  # the longest time until a signal to all processes reaches this process
ASK_EVERY_S = 5.0  # interval of the check for draining nodes
CANCELLED_WITHIN_S = 5.0
_KEPT = "with a checkpoint if a step is finished by then"


async def run_loop(
    work: Coroutine[Any, Any, T],
    notice: Notice,
    request: StopRequest,
    *,
    grace_s: float,
    call_timeout_s: float,
    draining_node: DrainingNode,
) -> T:
    """Run a loop that ends after a stop request. Return the loop's result.

    Args:
        grace_s: the time limit of the loop after the request. Ctrl-C has no limit, since a second Ctrl-C ends the loop.
        call_timeout_s: the longest time a call may block the event loop, as a call of a hanging Ray does.
        draining_node: returns the address of a draining node of the run, and its end time if known.
    """
    task = asyncio.ensure_future(work)
    request.ends_by_itself = True
    request.beats_within_s = call_timeout_s
    last_check, check = time.monotonic(), None
    without_ray: float | None = None  # time at which Ray's daemons were found dead
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_EVERY_S)
            request.beats, now = request.beats + 1, time.monotonic()
            if check is None and now - last_check >= ASK_EVERY_S:
                last_check, check = now, asyncio.ensure_future(draining_node())
            if check is not None and check.done():
                going, check = await check, None
                if going is not None and request.came is None:
                    request.came = now
                    left_s = math.inf if going[1] is None else going[1] - time.time()
                    grace_s = min(grace_s, left_s) if left_s > 0.0 else grace_s  # else this machine's clock is ahead
                    logger.warning("node %s is being drained", going[0])
                    tell_parent(is_final=True)
            without_ray = None if not OWN_RAY.is_ending else now if without_ray is None else without_ray
            is_over = without_ray is not None and now - without_ray > TOLD_WITHIN_S
            if is_over and request.came is None and not task.done():
                OWN_RAY.kill()
                raise RunError(f"the run's local Ray has died. {RESUMES}")
            if request.came is None or task.done():
                continue
            limit_s = None if request.signal is signal.SIGINT else grace_s
            if not notice.is_given:
                _say_what_follows(request, limit_s)
                notice.give()
            if OWN_RAY.is_ending:
                OWN_RAY.kill()
                raise Preempted("the step in progress was abandoned, because the run's local Ray was ended too")
            if limit_s is not None and time.monotonic() - request.came > limit_s:
                limit = f"{limit_s:g} s (train.preemption_grace_s, or less)"
                raise Preempted(f"the step in progress was not finished within {limit}")
        return await task
    finally:
        request.ends_by_itself, request.beats_within_s = False, math.inf
        left = [pending for pending in (task, check) if pending is not None]
        for pending in left:
            pending.cancel()
        await asyncio.wait(left, timeout=CANCELLED_WITHIN_S)


def _say_what_follows(request: StopRequest, limit_s: float | None) -> None:
    if limit_s is None:
        logger.warning("Ctrl-C: the run ends after its step, %s. A second Ctrl-C ends the run at once.", _KEPT)
        return
    reason = "the run is about to lose a node" if request.signal is None else request.signal.name
    logger.warning("%s: the run ends after its step and within %.0f s, %s", reason, limit_s, _KEPT)
