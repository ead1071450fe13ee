"""Wait for workers. Every wait has a deadline, and every error names stage, role, rank and cause."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.cluster.actor_locations import location_of, lost_nodes
from actors.cluster.connect import OWN_RAY
from actors.cluster.watch import died_for_memory, hang_of, stack_at
from rlhf.engine.device_errors import has_lost_device
from rlhf.engine.memory import advice_on_memory
from rlhf.errors import RESUMES, ChildLost, LossKind, ResultsLost, RunError, StorageFull, UserError, WorkerLost
from rlhf.process.disk_full import PAUSE
from rlhf.role_table import Role

T = TypeVar("T")
CALL_LIMIT, START_LIMIT = "cluster.call_timeout_s", "cluster.start_timeout_s"
IT_HANGS = " It hangs, or the limit is too short for the work."
DEATH_SHOWS_WITHIN_S = 2.0  # the peers of a dead rank may fail before it
DEATHS = (RayActorError, OutOfMemoryError)  # the second by Ray's memory monitor
PAUSED_FOR_S = 1.0  # extends a limit by no less
MOST_STACKS = 4  # of late workers in an error
MOST_TOLD = 600  # characters of a cause in a message


class Waits:
    def __init__(self) -> None:
        self._count = 0
        self._ended_at = 0.0  # the last wait

    @contextmanager
    def one(self) -> Iterator[None]:
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._ended_at = running_s()

    def idle_s(self) -> float:
        """Return the seconds since the last wait, and 0 during a wait."""
        return 0.0 if self._count else running_s() - self._ended_at


def running_s() -> float:
    """Return the time of a clock that stands still while the run waits for room."""
    return time.monotonic() - PAUSE.seconds()


WAITS = Waits()
_CAUSES: dict[str, asyncio.Future[tuple[LossKind, str, str | None]]] = {}  # of deaths, by actor


async def ended(
    futures: Collection[asyncio.Future[T]], limit_s: float
) -> tuple[set[asyncio.Future[T]], set[asyncio.Future[T]]]:
    """Wait until all futures are done or one has failed. Return the finished and the late futures.

    Time in which the run waits for room does not count towards the limit.
    """
    paused_s = PAUSE.seconds()
    while True:
        with WAITS.one():
            done, pending = await asyncio.wait(futures, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        before, paused_s = paused_s, PAUSE.seconds()
        limit_s = max(paused_s - before, PAUSED_FOR_S)
        if not pending or paused_s == before or any(future.cancelled() or future.exception() for future in done):
            return done, pending


async def within(awaitable: Awaitable[T], limit_s: float) -> T:
    """Return a result. TimeoutError: no result within the limit. Waits for room do not count."""
    future = asyncio.ensure_future(awaitable)
    try:
        await ended([future], limit_s)
        if not future.done():
            raise TimeoutError
        return future.result()
    finally:
        future.cancel()


async def wait_all(
    refs: Sequence[ObjectRef[Any]], *, role: Role, stage: str, deadline_s: float, limit: str = CALL_LIMIT
) -> list[Any]:
    """Return the results, in order. The first failure is raised at once.

    If a dead rank made peers fail too, the error names the dead rank. `limit`: see `wait_one`.
    """
    began = time.monotonic()
    futures = [asyncio.ensure_future(asyncio.wrap_future(ref.future())) for ref in refs]
    try:
        done, pending = await ended(futures, deadline_s)
        if pending and any(future.exception() is not None for future in done):
            done, _ = await asyncio.wait(futures, timeout=DEATH_SHOWS_WITHIN_S)
        failed = [(rank, f.exception()) for rank, f in enumerate(futures) if f in done and f.exception() is not None]
        if failed:
            rank, error = min(failed, key=lambda failure: (not isinstance(failure[1], DEATHS), failure[0]))
            raise await explain(error, role=role, rank=rank, stage=stage)
        if pending:
            late = [rank for rank, future in enumerate(futures) if future in pending]
            raise await _late(role, late, stage=stage, waited_s=time.monotonic() - began, limit=limit)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def wait_one(
    ref: ObjectRef[Any], *, role: Role, rank: int, stage: str, deadline_s: float, limit: str = CALL_LIMIT
) -> Any:
    """Return one worker's result. `limit` names the source of the deadline, such as a key of the configuration."""
    try:
        return await within(asyncio.wrap_future(ref.future()), deadline_s)
    except TimeoutError as error:
        raise await _late(role, [rank], stage=stage, waited_s=deadline_s, limit=limit) from error
    except RayError as error:
        raise await explain(error, role=role, rank=rank, stage=stage) from error


async def _late(role: Role, ranks: Sequence[int], *, stage: str, waited_s: float, limit: str) -> WorkerLost:
    who = f"{stage}: {role} rank {', '.join(map(str, ranks))}"
    message = f"{who} did not answer within {waited_s:.0f} s ({limit}).{await lost_nodes() or IT_HANGS}"
    stack = await stacks_at(role, ranks)
    return WorkerLost(message, role=role, rank=ranks[0], stage=stage, kind="hung", stack=stack)


def put(value: T) -> ObjectRef[T]:
    """Store a value in the object store. StorageFull: no room."""
    try:
        reference: ObjectRef[T] = ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise StorageFull(_no_room(error)) from error
    return reference


def _no_room(error: BaseException) -> str:
    return (
        f"Ray's object store and the disk to which it spills are full ({type(error).__name__}: {_short(str(error))}). "
        f"Make room on this disk, or raise cluster.object_store_gib. {RESUMES}"
    )


async def explain(error: BaseException | None, *, role: Role, rank: int, stage: str) -> Exception:
    """Return the failure as an error with stage, role, rank and cause.

    The error is WorkerLost if the worker's process died, or lost a necessary process or GPU. If the run's local Ray has
    died too, the error is no WorkerLost.
    """
    failure = await _explained(error, f"{stage}: {role} rank {rank}", role=role, rank=rank, stage=stage)
    failure.__cause__ = error
    return failure


async def _explained(error: BaseException | None, who: str, *, role: Role, rank: int, stage: str) -> Exception:
    cause = error.cause if isinstance(error, RayTaskError) else error
    described = f"{type(cause).__name__}: {_short(str(cause))}"

    def lost(message: str, kind: LossKind, error: type[WorkerLost] = WorkerLost) -> WorkerLost:
        return error(f"{who} {message}", role=role, rank=rank, stage=stage, kind=kind)

    if OWN_RAY.is_ending:  # nothing can be started again in it
        return RunError(f"{who} was lost with the run's local Ray, which has died. {RESUMES}")
    if isinstance(cause, ObjectLostError):
        results = f"cannot read results that a lost node held: {_short(str(cause))}{await lost_nodes()}"
        return lost(results, "died", ResultsLost)
    if not isinstance(error, RayTaskError):
        if isinstance(error, RayActorError):
            return await _death(error, who, role=role, rank=rank, stage=stage)
        if isinstance(error, OutOfMemoryError):
            memory = f"{_short(str(error))} {advice_on_memory(role)}"
            return lost(f"was killed because its node ran out of memory: {memory}", "out_of_memory")
        return RunError(f"{who} failed: {described}{await lost_nodes()}")
    if isinstance(cause, UserError):
        return UserError(str(cause))
    if isinstance(cause, ChildLost):
        return lost(f"cannot work any more: {cause}", cause.kind)
    if has_lost_device(cause):
        return lost(f"cannot work any more, because its GPU failed: {described}", "died")
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        return StorageFull(f"{who} failed: {_no_room(cause)}")
    if isinstance(cause, StorageFull):
        return StorageFull(f"{who} failed: {cause}")
    nodes = await lost_nodes()
    reason = str(cause) if isinstance(cause, RunError) else described
    return RunError(f"{who} failed: {reason}{f'{nodes} {RESUMES}' if nodes else ''}")


async def _death(error: RayActorError, who: str, *, role: Role, rank: int, stage: str) -> RunError:
    """Return the error of a dead process. All failed calls to the process share one search for the cause."""
    if error.actor_init_failed:  # its successor would fail in the same way
        return RunError(f"{who} {await _how_it_died(error)} {RESUMES}")
    actor = error.actor_id or ""
    if actor == "" or actor not in _CAUSES:
        _CAUSES[actor] = asyncio.ensure_future(_cause_of_death(error, role))
    kind, how, stack = await asyncio.shield(_CAUSES[actor])
    return WorkerLost(f"{who} {how}", role=role, rank=rank, stage=stage, kind=kind, stack=stack)


async def _cause_of_death(error: RayActorError, role: Role) -> tuple[LossKind, str, str | None]:
    """Return the kind and the description of a death, and the stack of a process that the watch has killed."""
    hang = hang_of(error.actor_id)
    if hang is not None:
        return "hung", f"{hang.reason} Its stack is in errors.jsonl.", hang.stack
    how = await _how_it_died(error)
    if await died_for_memory(error.actor_id or ""):
        return "out_of_memory", f"{how} The kernel killed a process there for memory. {advice_on_memory(role)}", None
    return "died", how, None


async def stacks_at(role: Role, ranks: Sequence[int]) -> str | None:
    """Return the stacks of late workers, at most MOST_STACKS; None if none is known."""
    chosen = ranks[:MOST_STACKS]
    stacks = zip(chosen, await asyncio.gather(*[stack_at(role, rank) for rank in chosen]), strict=True)
    return "\n".join(f"{role} rank {rank}\n{stack}" for rank, stack in stacks if stack is not None) or None


async def _how_it_died(error: RayActorError) -> str:
    """Return Ray's reason for a death, and the log file with the process's last output."""
    message = str(error)
    if error.actor_init_failed:
        return f"could not be created: {_short(message.strip().splitlines()[-1])}."
    was = location_of(error.actor_id)
    node_failure = await asyncio.to_thread(was.node_failure) if was is not None else None
    if was is not None and node_failure is not None:
        return f"died with its node (process {was.pid} on {was.address}): {node_failure}."
    pid, host = re.search(r"pid: (\d+)", message), re.search(r"ip: (\S+)", message)
    number, address = (was.pid, was.address) if was is not None else (pid and pid[1], host and host[1])
    detail = re.search(r"(?:Worker exit detail|The actor is dead because|is unavailable): *(.*)", message)
    where = f" (process {number}{f' on {address}' if address else ''})" if number else ""
    log = f" Its last output is in {_logs()}/worker-*-{number}.err there." if number else ""
    return f"died{where}. {_short(detail[1]) if detail else ''}{log}"


def _logs() -> Path:  # of Ray's workers, the same on every node
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_TOLD else line[:MOST_TOLD] + " ..."
