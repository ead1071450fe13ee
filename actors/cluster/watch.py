"""Ping the processes of all actors, and kill hanging processes.

A process hangs if it answers no heartbeat for `cluster.heartbeat_timeout_s`. The stack of the process is dumped on its
node, and the process is killed. Ray then fails waiting calls, and `actors.cluster.waiting.explain` finds the reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import RayError

from actors.cluster.actor_locations import ActorLocation, location_of, locations, on_node
from actors.cluster.heartbeat import PING, STACKS, Beat, Child, OomKills, count_oom_kills
from rlhf.process.disk_full import PAUSE
from rlhf.process.stopping import finishes_within
from rlhf.role_table import Role

T = TypeVar("T")

logger = logging.getLogger(__name__)
PING_EVERY_S = 5.0
TICK_S = 1.0
DUMPED_WITHIN_S = 10.0
ON_NODE_WITHIN_S = 30.0  # a process on another node starts first
COUNTED_WITHIN_S = 5.0
LONGEST_STACK = 20_000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    reason: str
    stack: str


_HANGS: dict[str, Hang] = {}  # by actor
_OOM_KILLS: dict[str, OomKills] = {}  # by actor, at its last answer
_CHILDREN: dict[str, tuple[Child, ...]] = {}  # by actor, at its last answer


def children_of(actor: str) -> tuple[Child, ...]:
    """Return the processes started by an actor's process before the last heartbeat."""
    return _CHILDREN.get(actor, ())


def hang_of(actor: str | None) -> Hang | None:
    """Return why the watch killed an actor's process. None: not killed by the watch."""
    return _HANGS.get(actor or "")


@asynccontextmanager
async def watching(timeout_s: float) -> AsyncIterator[None]:
    """Watch all processes of the run's actors during the block."""
    watch = asyncio.create_task(_watch_all(timeout_s))
    watch.add_done_callback(_log_failure)
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait([watch])


def _log_failure(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and watch.exception() is not None:
        logger.error("the heartbeats of a process are no longer watched", exc_info=watch.exception())


async def _watch_all(timeout_s: float) -> None:
    watches: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            places = locations()
            for actor in watches.keys() - places.keys():
                watches.pop(actor).cancel()
            for actor in places.keys() - watches.keys():
                watches[actor] = asyncio.create_task(_watch_one(actor, places[actor], timeout_s))
                watches[actor].add_done_callback(_log_failure)
            await asyncio.sleep(TICK_S)
    finally:
        for watch in watches.values():
            watch.cancel()


async def _watch_one(actor: str, place: ActorLocation, timeout_s: float) -> None:
    """Ping a process until its death, and kill a hanging process. A process that never answered is not killed."""
    has_answered = False
    try:
        while True:
            ping = asyncio.ensure_future(_ping(place, has_answered=has_answered))
            try:
                if not await _finishes(ping, timeout_s):
                    break
                beat = ping.result()
            except ConnectionRefusedError:  # the process died, and Ray fails its calls
                return
            finally:
                ping.cancel()
            has_answered = True
            _CHILDREN[actor] = beat.children
            if beat.oom_kills is not None:
                _OOM_KILLS[actor] = beat.oom_kills
            PAUSE.hear(actor, (replace(shortage, path=f"{place.who}: {shortage.path}") for shortage in beat.shortages))
            await asyncio.sleep(min(PING_EVERY_S, timeout_s / 4))
        if has_answered:
            await _give_up(actor, place, timeout_s)
        else:
            logger.warning(
                "%s (process %d) cannot be watched: the driver does not reach port %d of %s. A hang of this process is "
                "noticed only after cluster.call_timeout_s.",
                *(place.who, place.pid, place.heartbeat_port, place.address),
            )
    finally:
        PAUSE.hear(actor, ())


async def _finishes(ping: asyncio.Future[Beat], limit_s: float) -> bool:
    """Return whether a ping is answered within the limit. Time in which the driver was stopped does not count."""
    waited = 0.0
    while waited < limit_s:
        tick, began = min(TICK_S, limit_s / 4), time.monotonic()
        if (await asyncio.wait([ping], timeout=tick))[0]:
            return True
        waited += min(time.monotonic() - began, 2 * tick)
    return False


async def _ping(place: ActorLocation, *, has_answered: bool) -> Beat:
    """Return the answer of the process. Retry if the node cannot be reached, or the connection breaks off.

    ConnectionRefusedError: the process is dead. Before the first answer a firewall may refuse the connection, so retry.
    """
    while True:
        try:
            return Beat.of(await _ask(place, PING))
        except OSError as error:
            if has_answered and isinstance(error, ConnectionRefusedError):
                raise
            await asyncio.sleep(TICK_S)


async def _ask(place: ActorLocation, question: bytes) -> bytes:
    """Return the answer of a process. ConnectionError: the process ended, or the connection broke off."""
    reader, writer = await asyncio.open_connection(place.address, place.heartbeat_port)
    try:
        writer.write(question)
        answer = await reader.read()
    finally:
        writer.close()
    if not answer:
        raise ConnectionResetError(f"{place.who} gave no answer")
    return answer


async def _give_up(actor: str, place: ActorLocation, timeout_s: float) -> None:
    """Dump the stack of a process, record the reason for giving up, and kill the process."""
    failure = await asyncio.to_thread(place.node_failure)
    where = f"process {place.pid} on {place.address}"
    stack = None if failure is not None else await _there(place, partial(dump_stack, place.pid))
    how = f"{failure}" if failure is not None else "it hangs, and was killed"
    reason = f"answered no heartbeat for {timeout_s:.0f} s (cluster.heartbeat_timeout_s; {where}): {how}."
    _HANGS[actor] = Hang(reason=reason, stack=stack or f"There is no stack of {where}: its node does not answer.")
    logger.warning("%s %s", place.who, reason)
    if failure is None:
        await _there(place, partial(kill, place.pid))
    if place.handle is not None:  # a lost node, or a process that not even SIGKILL ends
        await asyncio.to_thread(finishes_within, DUMPED_WITHIN_S, partial(ray.kill, place.handle), "ray.kill")


async def stack_at(role: Role, rank: int) -> str | None:
    """Return the stack of a late worker, from the worker itself if possible. None: unknown."""
    place = next((place for place in locations().values() if place.who == f"{role} rank {rank}"), None)
    if place is None:
        return None
    try:
        return (await asyncio.wait_for(_ask(place, STACKS), TICK_S * 5)).decode()[:LONGEST_STACK]
    except (OSError, TimeoutError):
        return await _there(place, partial(dump_stack, place.pid))


async def _there(place: ActorLocation, work: Callable[[], T], *, within_s: float = ON_NODE_WITHIN_S) -> T | None:
    """Return the result of work on the node of a process; None if the node does not answer within the limit."""
    if place.node == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(work)
    answer = asyncio.wrap_future(on_node(place.node, work).future())
    try:
        return await asyncio.wait_for(answer, within_s)
    except (RayError, TimeoutError):
        return None


def dump_stack(pid: int) -> str:
    """Return the stacks of all threads of a process on this host, even of a stopped process."""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DUMPED_WITHIN_S, check=False)
        if result.returncode == 0:
            return result.stdout[:LONGEST_STACK]
        reason = " ".join(result.stderr.split())
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    return f"py-spy could not read process {pid} ({reason}). Unless it is stopped, its log has its stack."


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def died_for_memory(actor: str) -> bool:
    """Return whether the kernel has killed a process for memory near an actor since the actor's last heartbeat."""
    place, before = location_of(actor), _OOM_KILLS.get(actor)
    if place is None or before is None:
        return False
    now = await _there(place, partial(count_oom_kills, before.path), within_s=COUNTED_WITHIN_S)
    return now is not None and now.count > before.count
