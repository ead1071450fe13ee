"""Start, call and end groups of actors that form one role."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.cluster.processes import KEEPS_MEMORY, Processes, hub_environment
from actors.cluster.waiting import CALL_LIMIT, START_LIMIT, wait_all, wait_one
from actors.cluster.watch import watching
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.controller.supervisor import ITS_START, Supervisor
from rlhf.engine.distributed import RankContext
from rlhf.errors import ResultsLost, RunError, WorkerLost
from rlhf.role_table import Role
from rlhf.roles import Ref
from rlhf.types import MemoryReport

T = TypeVar("T")
SpawnOne = Callable[[int], ActorHandle[Any]]  # creates the actor of a rank

logger = logging.getLogger(__name__)
END_WITHIN_S = 10.0
STOP_LIMIT = "the limit of an orderly end"


class Stoppable(Protocol):
    """A group of actors with an orderly and an immediate end."""

    async def stop(self) -> None: ...

    def end(self) -> None: ...


@asynccontextmanager
async def ending(
    groups: Sequence[Stoppable], release: Callable[[], object], *, heartbeat_timeout_s: float
) -> AsyncIterator[None]:
    """Stop the groups in order after the block, when all results are on disk. After a failure, end the groups at once.

    `release` then gives the resources back to the cluster. During the block, a process without an answer to heartbeats
    for heartbeat_timeout_s is killed.
    """
    try:
        async with watching(heartbeat_timeout_s):
            yield
        for group in groups:
            try:
                await group.stop()
            except RunError as error:
                reason = error.reason if isinstance(error, WorkerLost) else error  # nothing is left to resume
                logger.warning("%s It is killed instead.", reason)
    finally:
        with ExitStack() as ends:  # all exits run, even if one of them fails
            ends.callback(release)
            for group in reversed(groups):
                ends.callback(group.end)


@asynccontextmanager
async def ending_rebuilds(groups: Iterable[WorkerGroup]) -> AsyncIterator[None]:
    """End the rebuilds in progress after the block. Rebuilds write to the record, and the record is closed later."""
    try:
        yield
    finally:
        for group in groups:
            await group.give_up_rebuilds()


class WorkerGroup:
    """The actors of one role, in rank order. The error of a failed call names stage, role and rank."""

    role: Role
    supervisor: Supervisor | None = None  # None: a lost worker ends the work
    placement: Placement | None = None  # where a successor is placed
    start_deadline_s: float

    def __init__(
        self, handles: Sequence[ActorHandle[Any]], spawn_one: SpawnOne | None = None, *, deadline_s: float
    ) -> None:
        """Create a group of workers before their start. `spawn_one` None: no worker can be replaced."""
        self.handles = list(handles)
        self._spawn_one = spawn_one
        self.deadline_s = deadline_s
        self.processes = Processes(self.role, self.handles)
        self._rebuilds: dict[int, asyncio.Task[None]] = {}  # restarts of a pool, in progress or failed, by rank

    async def all(
        self, refs: Sequence[ObjectRef[Any]], stage: str, *, deadline_s: float | None = None, limit: str = CALL_LIMIT
    ) -> list[Any]:
        """Return the results of all workers, in rank order. `limit` names the source of the deadline."""
        limit_s = deadline_s or self.deadline_s
        return await wait_all(refs, role=self.role, stage=stage, deadline_s=limit_s, limit=limit)

    async def each(self, send: Callable[[Any], ObjectRef[Any]], stage: str) -> list[Any]:
        return await self.all([send(handle) for handle in self.handles], stage)

    async def one(
        self, ref: ObjectRef[T], stage: str, *, rank: int = 0, deadline_s: float | None = None, limit: str = CALL_LIMIT
    ) -> T:
        limit_s = self.deadline_s if deadline_s is None else deadline_s
        result: T = await wait_one(ref, role=self.role, rank=rank, stage=stage, deadline_s=limit_s, limit=limit)
        return result

    async def start(self, *, deadline_s: float) -> None:
        """Let each worker load its model or other state."""
        self.start_deadline_s = deadline_s
        await self.processes.wait_until_started(deadline_s=deadline_s)
        await self.all([h.start.remote() for h in self.handles], "start", deadline_s=deadline_s, limit=START_LIMIT)

    async def _replace(self, rank: int) -> None:
        """Start a worker again in the same place, in a new process, within the limit of the group's start."""
        ends = time.monotonic() + self.start_deadline_s
        await self.processes.end_one(rank)
        if self.placement is not None:
            await self.placement.wait_until_whole(limit_s=ends - time.monotonic())
        await self._start_one(rank, ends=ends)

    async def _start_one(self, rank: int, *, ends: float) -> None:
        """Start a worker in a free place, until a moment of time.monotonic."""
        assert self._spawn_one is not None
        self.handles[rank] = self._spawn_one(rank)
        await self.processes.wait_until_created(rank, deadline_s=ends - time.monotonic())
        for ref in self._start_calls(self.handles[rank]):
            await self.one(ref, "start", rank=rank, deadline_s=ends - time.monotonic(), limit=START_LIMIT)

    def _start_calls(self, handle: ActorHandle[Any]) -> list[ObjectRef[Any]]:
        """Send the calls that load a replaced worker. Return the calls' references in order."""
        return [handle.start.remote()]

    async def memory(self) -> MemoryReport:
        """Return the memory peaks of the largest worker."""
        reports: list[MemoryReport] = await self.each(lambda h: h.memory.remote(), "memory")
        gpus = [report.gpu_gib for report in reports if report.gpu_gib is not None]
        return MemoryReport(rss_gib=max(report.rss_gib for report in reports), gpu_gib=max(gpus) if gpus else None)

    async def give_up_rebuilds(self) -> None:
        """End the rebuilds in progress. No rebuild continues after the return."""
        for rebuild in self._rebuilds.values():
            rebuild.cancel()
        await asyncio.gather(*self._rebuilds.values(), return_exceptions=True)

    async def stop(self) -> None:
        """End the workers. Workers hold no state worth saving."""
        self.end()

    def end(self) -> None:
        """End the workers at once, with all processes started by workers."""
        for rebuild in self._rebuilds.values():
            rebuild.cancel()
        self.processes.end()


class ModelGroup(WorkerGroup):
    """Workers that can leave a GPU shared with an engine."""

    async def offload(self) -> None:
        await self.each(lambda h: h.offload.remote(), "offload")

    async def reload(self) -> None:
        await self.each(lambda h: h.reload.remote(), "reload")

    async def start_profile(self) -> None:
        await self.each(lambda h: h.start_profile.remote(), "profile")

    async def stop_profile(self, folder: Path) -> None:
        await self.each(lambda h: h.stop_profile.remote(folder), "profile")


class WorkerPool(WorkerGroup):
    """Workers independent of each other. A lost worker is replaced, and the worker's calls are repeated."""

    def __init__(
        self, handles: Sequence[ActorHandle[Any]], spawn_one: SpawnOne | None = None, *, deadline_s: float
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.last_loss: dict[int, WorkerLost] = {}  # by rank: the last loss that the supervisor has counted

    async def start(self, *, deadline_s: float) -> None:
        """Load what each worker needs. A worker that is lost during the call is started again."""
        self.start_deadline_s = deadline_s
        await all_results([self._first_start(rank, deadline_s) for rank in range(len(self.handles))])

    async def _first_start(self, rank: int, deadline_s: float) -> None:
        handle = self.handles[rank]
        try:
            await self.processes.wait_until_created(rank, deadline_s=deadline_s)
            await self.one(handle.start.remote(), "start", rank=rank, deadline_s=deadline_s, limit=START_LIMIT)
        except WorkerLost as lost:
            await self.make_good(rank, handle, lost, work=ITS_START)

    async def until_answered(self, rank: int, call: Callable[[Any], Awaitable[T]], *, work: Hashable = None) -> T:
        """Return the result of a call to one worker. If the worker is lost, call the successor. `work`: the worker's
        task. A worker lost twice in a row at the same task ends the run. `work` None: more losses are allowed."""
        while True:
            handle = await self.working(rank)
            try:
                result = await call(handle)
            except WorkerLost as lost:
                await self.make_good(rank, handle, lost, work=work)
                continue
            if work is not None and self.supervisor is not None:
                self.supervisor.succeeded(self.role, rank)
            return result

    async def ask(self, rank: int, send: Callable[[Any], ObjectRef[T]], stage: str, *, work: Hashable = None) -> T:
        return await self.until_answered(rank, lambda handle: self.one(send(handle), stage, rank=rank), work=work)

    async def each(self, send: Callable[[Any], ObjectRef[Any]], stage: str) -> list[Any]:
        return await all_results([self.ask(rank, send, stage) for rank in range(len(self.handles))])

    async def columns(
        self, rank: int, send: Callable[[Any], Sequence[ObjectRef[Any]]], stage: str, *, work: Hashable
    ) -> Sequence[Ref[Any]]:
        """Return references to the results of a method of one worker, except for the small last result."""

        async def call(handle: ActorHandle[Any]) -> Sequence[Ref[Any]]:
            *columns, done = send(handle)
            await self.one(done, stage, rank=rank)
            return columns

        return await self.until_answered(rank, call, work=work)

    async def working(self, rank: int) -> ActorHandle[Any]:
        """Return the handle of a worker, after the end of a rebuild in progress. Raise the failure of a rebuild."""
        if rank in self._rebuilds:
            await asyncio.shield(self._rebuilds[rank])
        return self.handles[rank]

    async def make_good(self, rank: int, handle: ActorHandle[Any], lost: WorkerLost, *, work: Hashable = None) -> None:
        """Replace a lost worker once, however many calls were lost with it. Raise the loss if the run must end."""
        self.begin_rebuild(rank, handle, lost, work=work)
        await self.working(rank)

    def begin_rebuild(self, rank: int, handle: ActorHandle[Any], lost: WorkerLost, *, work: Hashable = None) -> None:
        """Begin to replace a lost worker, unless already begun. Raise the loss if the run must end. `handle`: the lost
        worker's handle, since a successor may already have taken the place."""
        if self.supervisor is None or self.processes.ended or isinstance(lost, ResultsLost):
            raise lost
        if rank not in self._rebuilds and self.handles[rank] is handle:
            self.last_loss[rank] = lost
            self._rebuild(rank, self._recover(rank, lost, work))

    async def _recover(self, rank: int, lost: WorkerLost, work: Hashable) -> None:
        assert self.supervisor is not None
        await self.supervisor.recover(lost, partial(self._replace, rank), work=work)

    def _rebuild(self, rank: int, work: Coroutine[Any, Any, None]) -> None:
        """Start the task `work`, which gives a rank a new worker."""
        self._rebuilds[rank] = asyncio.create_task(work)
        self._rebuilds[rank].add_done_callback(partial(self._rebuilt, rank))

    def _rebuilt(self, rank: int, rebuild: asyncio.Task[None]) -> None:
        if not rebuild.cancelled() and rebuild.exception() is None:  # a failure is kept for the calls that come later
            del self._rebuilds[rank]


async def all_results(calls: Sequence[Awaitable[T]]) -> list[T]:
    """Return the results of all calls, in order. The first failure cancels the rest."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _rank_contexts(cluster: ClusterConfig, placement: Placement, role: Role) -> list[RankContext]:
    """Return the context of each rank of a role. On a GPU, a process sees only the assigned device."""
    nodes, threads = placement.nodes_of(role), placement.threads(role, getattr(cluster.roles, role).threads)
    cuda = cluster.device == "cuda" and placement.plan.slots[role][0].gpus > 0.0
    return [
        RankContext(
            rank=rank,
            world_size=len(nodes),
            local_rank=0 if cuda else nodes[:rank].count(node),
            local_world_size=1 if cuda else nodes.count(node),
            device="cuda" if cuda else "cpu",
            threads=threads[rank],
            deadline_s=cluster.call_timeout_s + cluster.room_timeout_s,  # its peers may wait for room
        )
        for rank, node in enumerate(nodes)
    ]


def worker_environment(context: RankContext) -> dict[str, str]:
    """Return the environment of a worker with torch. The environment must be set before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(context.threads),
        "DS_ACCELERATOR": context.device,
        "TOKENIZERS_PARALLELISM": "false",
        **(KEEPS_MEMORY if context.device == "cpu" else {}),
        **hub_environment(),
    }


def spawn(
    cluster: ClusterConfig,
    placement: Placement,
    role: Role,
    worker: type,
    *args: Any,
    longest_sequence: int,
    images: Path | None = None,
    concurrency: int = 1,
    **options: Any,
) -> tuple[list[ActorHandle[Any]], SpawnOne]:
    """Create an actor for each rank of a role. Return the actors, and a function that creates a rank's actor again.

    The arguments of an actor are `args`, the rank's context, and `options`. `longest_sequence`: most tokens of a
    sequence, for the frequencies of the model's RoPE. `images`: the folder of the run's images.
    """
    remote = ray.remote(worker)

    def create(context: RankContext) -> ActorHandle[Any]:
        settings = placement.options(role, context.rank, worker_environment(context), concurrency=concurrency)
        given = replace(context, longest_sequence=longest_sequence, images=images)
        handle: ActorHandle[Any] = remote.options(**settings).remote(*args, given, **options)
        return handle

    def spawn_one(rank: int) -> ActorHandle[Any]:
        return create(_rank_contexts(cluster, placement, role)[rank])  # the new actor may be on another node

    return [create(context) for context in _rank_contexts(cluster, placement, role)], spawn_one
