"""The rollout role: distributes prompts among vLLM engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.cluster.actor_locations import lost_nodes
from actors.cluster.waiting import ended, explain, stacks_at, within
from actors.roles.gang import PolicyGang
from actors.roles.group import END_WITHIN_S, STOP_LIMIT, SpawnOne
from actors.rollout.dispatch import Dispatch, GroupWork, Slot, shares
from actors.rollout.elastic_engines import ElasticEngines
from rlhf.config.derive import WeightSync
from rlhf.config.transports import TRANSPORTS, Transport
from rlhf.errors import WorkerLost
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, EnginePart
from rlhf.types import GroupRequest, RolloutInfo, Sampling

logger = logging.getLogger(__name__)


class RolloutEngines(ElasticEngines):
    """All engines of a run. `sync` is the transport of the policy's weights, or None for frozen engines.

    `generate` distributes requests by order and largest size, and an engine starts the whole share in one step. A batch
    of the same requests under the same weights is therefore always scheduled and rounded alike. After the loss of an
    engine, the successor answers the whole share again. `answer` distributes requests by the engines' outstanding work.
    After a loss, any engine answers the lost requests.
    """

    role: Role = "rollout"

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        spawn_one: SpawnOne | None = None,
        *,
        sync: WeightSync | None = None,
        deadline_s: float,
        tensor_parallel: int = 1,
        conversation_tokens: int | None = None,
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.sync = sync
        self.tensor_parallel = tensor_parallel
        self.conversation_tokens = conversation_tokens  # the most; None: a single turn answers a prompt
        self._meet: Callable[[], Awaitable[None]] | None = None  # prepares broadcasts; None: there are none
        self._cancelled: set[int] = set()  # not returned until requested again
        self._asking = asyncio.Lock()
        self._answering = [asyncio.Lock() for _ in handles]  # held while an engine answers a share

    async def connect(self, policy: PolicyGang, *, adapter: Path | None) -> None:
        """Open both ends of the weight transport.

        adapter: the folder for an adapter alone, visible to the policy and to engines on all hosts. None: all weights.
        """
        assert self.sync is not None, "frozen engines are not connected to a policy"
        policy.reconnect = partial(self._connect, policy, self.sync, adapter=adapter)
        await policy.reconnect()
        self.grow()

    async def _connect(self, policy: PolicyGang, sync: WeightSync, *, adapter: Path | None) -> None:
        method = sync.method
        self.gives_published = adapter is not None or TRANSPORTS[method].stays
        self.is_replaceable = self.gives_published or TRANSPORTS[method].meets
        self.opens_weights = adapter is None
        if adapter is not None:
            logger.info("each sync sends the adapter as a folder, %s", adapter)
            await policy.open_weights(method, None, adapter, num_engines=len(self.handles))
            return
        logger.info("each sync sends the weights by %s: %s", method, sync.why)
        if TRANSPORTS[method].meets:
            self._meet, self._met = partial(self._meet_policy, policy, method), None
            await self.withdraw_weights()  # and connect: no engine leaves before weights are published
            return
        await asyncio.gather(
            policy.open_weights(method, None, None, num_engines=len(self.handles)),
            self.present(lambda h: h.open_weights.remote(None, 0), "weight sync"),
        )

    async def _meet_policy(self, policy: PolicyGang, method: Transport) -> None:
        """Let the policy meet all working engines, for broadcasts."""
        members = self.reachable()
        meeting = await policy.meeting(num_receivers=len(members) * self.tensor_parallel, timeout_s=self.deadline_s)

        def open_end(handle: ActorHandle[Any]) -> Any:
            return handle.open_weights.remote(meeting, 1 + [*members.values()].index(handle) * self.tensor_parallel)

        await asyncio.gather(
            policy.open_weights(method, meeting, None, num_engines=len(self.handles)),
            self.together(members, open_end),
        )
        self._met = members

    async def withdraw_weights(self) -> None:
        await super().withdraw_weights()
        if self._meet is not None:
            await self.present(lambda h: h.health.remote(), "weight sync")  # a broadcast to a lost engine fails
            if self.reachable() != self._met:
                await self._meet()

    async def fronts(self, key: str, name: str) -> tuple[str, ...]:
        """Return the base URLs of the working engines' fronts, which admit calls with the key under a model's name."""
        here, urls = str(ray.util.get_node_ip_address()), dict[int, str]()
        while not urls:
            await self.any_working()
            working = [handle for rank, handle in enumerate(self.handles) if rank not in self._rebuilds]
            urls = await self.present(lambda h: h.admit.remote(key, name, here), "eval", among=working)
        return tuple(urls.values())

    async def renew(self, spool: Path) -> bool:
        """Prepare the engines for another run. Return False if an engine still works for the last run, or starts."""
        self._withdraw()
        self.spool = spool
        return not self._rebuilds and all(await self.all([h.renew.remote(spool) for h in self.handles], "start"))

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        """Answer all requests except cancelled requests, and yield each completed group at once.

        The first failure ends the wait, for example a request refused by an engine before the batch starts.
        """
        self._cancelled.difference_update(request.group_id for request in requests)  # cancelled after their batch
        places = shares([self._work(request, sampling) for request in requests], len(self.handles))
        answered: asyncio.Queue[CompletedGroup | None] = asyncio.Queue()  # None: a share is answered, or failed
        tasks = []
        for engine, own in enumerate(places):
            share = self._answer_share(engine, [requests[i] for i in own], sampling, version, answered.put_nowait)
            tasks.append(asyncio.create_task(share))
            tasks[-1].add_done_callback(lambda _: answered.put_nowait(None))
        unfinished = len(tasks)
        try:
            while unfinished:
                group = await answered.get()
                if group is None:
                    unfinished -= 1
                    for task in tasks:
                        if task.done():
                            task.result()
                elif group.request.group_id not in self._cancelled:
                    yield group
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._cancelled.difference_update(request.group_id for request in requests)

    async def _answer_share(
        self,
        own: int,
        share: Sequence[GroupRequest],
        sampling: Sampling,
        version: int,
        answered: Callable[[CompletedGroup], None],
    ) -> None:
        """Ask an engine for a share of a batch, and report each group once.

        The successor of a lost engine gets all requests of the share again, for the same batching as before, and
        returns finished groups from the store. If a successor must wait for the next sync, another engine answers the
        share after finishing its own.
        """
        unanswered = {request.group_id for request in share}
        while not unanswered <= self._cancelled:
            engine = self._engine_for(own)
            async with self._answering[engine]:
                if self._engine_for(own) != engine:  # the engine was lost after this group was sent
                    continue
                handle = await self.working(engine)
                if unanswered <= self._cancelled:
                    return
                self.unanswered[engine] = unanswered
                try:
                    async for group in self._ask(handle, engine, share, sampling, version):
                        self._note_success(engine)
                        if group.request.group_id in unanswered:
                            unanswered.discard(group.request.group_id)
                            answered(group)
                    return
                except WorkerLost as lost:
                    self.begin_rebuild(engine, handle, lost)

    def _engine_for(self, own: int) -> int:
        if self.gives_published or own not in self._rebuilds:
            return own
        return next((engine for engine in range(len(self.handles)) if engine not in self._rebuilds), own)

    async def _ask(
        self, handle: ActorHandle[Any], engine: int, share: Sequence[GroupRequest], sampling: Sampling, version: int
    ) -> AsyncIterator[CompletedGroup]:
        """Give a share to an engine in one step, and yield each completed group at once."""
        await self.one(handle.hold.remote(), "rollouts", rank=engine)
        waits: dict[asyncio.Future[Any], tuple[GroupRequest, Any] | None] = {}  # None: the start of the share
        for request in share:
            columns, scalars = handle.generate.options(num_returns=2).remote(request.for_engine(), sampling, version)
            waits[asyncio.wrap_future(scalars.future())] = request, columns
        waits[asyncio.wrap_future(handle.release.remote(len(share)).future())] = None
        finished: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        for future in waits:
            future.add_done_callback(finished.put_nowait)
        try:
            while waits:
                try:
                    future = await within(finished.get(), self.deadline_s)
                except TimeoutError as error:
                    raise await self._hung(engine) from error
                group = waits.pop(future)
                infos: tuple[RolloutInfo, ...] | None = await _result(future, engine)
                if group is not None and infos is not None:
                    yield CompletedGroup(request=group[0], rollouts=group[1], infos=infos)
        finally:
            for future in waits:
                _silence(future)

    async def _hung(self, engine: int) -> WorkerLost:
        return WorkerLost(
            f"rollouts: engine {engine} finished none of its prompts in {self.deadline_s:.0f} s "
            f"(cluster.call_timeout_s).{await lost_nodes()}",
            role=self.role,
            rank=engine,
            stage="rollouts",
            kind="hung",
            stack=await stacks_at(self.role, [engine]),
        )

    def _note_success(self, engine: int) -> None:
        """Record that an engine finished a group, so that the engine's next loss does not count as a repeated loss."""
        if self.supervisor is not None:
            self.supervisor.succeeded(self.role, engine)

    async def answer(
        self, request: GroupRequest, sampling: Sampling, *, oldest: int, urgent: bool = False
    ) -> CompletedGroup | None:
        """Answer one request with the engines' current weights. None: the request was cancelled.

        The request waits here while all engines are full. Then the least loaded engine gets the request, with all
        samples. After the loss of that engine the request comes before waiting requests.
        """
        self._cancelled.discard(request.group_id)
        dispatch = await self._dispatching()
        while request.group_id not in self._cancelled:
            slot = await dispatch.enter(request.group_id, self._work(request, sampling), urgent=urgent)
            if slot is None:
                break
            handle = self.handles[slot.engine]
            with self._at_work(request.group_id, slot, dispatch) as lengths:
                if request.group_id in self._cancelled:
                    break
                rollouts, scalars = handle.answer.options(num_returns=2).remote(request.for_engine(), sampling, oldest)
                try:
                    infos: tuple[RolloutInfo, ...] | None = await self._answered(scalars, slot.engine, dispatch)
                except WorkerLost as lost:
                    self.begin_rebuild(slot.engine, handle, lost)  # closes the engine before its place is released
                    urgent = True
                    continue
                lengths += [info.num_tokens_after_prompt for info in infos or ()]
            self._note_success(slot.engine)
            if infos is None or request.group_id in self._cancelled:
                break
            return CompletedGroup(request=request, rollouts=rollouts, infos=infos)
        return None

    @contextmanager
    def _at_work(self, key: int, slot: Slot, dispatch: Dispatch) -> Iterator[list[int]]:
        """Note that an engine works on a group during the block, which may add the lengths of the responses."""
        self.unanswered[slot.engine].add(key)
        lengths: list[int] = []
        try:
            yield lengths
        finally:
            self.unanswered[slot.engine].discard(key)
            dispatch.leave(slot, lengths)

    async def restored(self, group: CompletedGroup, sampling: Sampling) -> CompletedGroup:
        while True:
            engine = await self.any_working()
            handle = self.handles[engine]
            rollouts, scalars = handle.stored.options(num_returns=2).remote(group.request, sampling, group.infos)
            try:
                await self.one(scalars, "rollouts", rank=engine)
            except WorkerLost as lost:
                self.begin_rebuild(engine, handle, lost)
                continue
            return replace(group, rollouts=rollouts)

    async def _answered(self, scalars: ObjectRef[Any], engine: int, dispatch: Dispatch) -> Any:
        """Return the scalars of a group. WorkerLost: the engine finishes no group within the deadline."""
        future = asyncio.wrap_future(scalars.future())
        try:
            while not future.done():
                left_s = self.deadline_s - dispatch.quiet_s(engine)
                if left_s <= 0.0:
                    raise await self._hung(engine)
                await ended([future], left_s)
            return await _result(future, engine)
        finally:
            _silence(future)

    async def _dispatching(self) -> Dispatch:
        """Return the dispatch. The first call asks the engines for their capacities."""
        async with self._asking:
            if self._dispatch is None:
                self._capacities |= await self.present(lambda h: h.capacity.remote(), "rollouts")
                self._dispatch = Dispatch()
                for engine in self._capacities.keys() - self._rebuilds.keys():
                    self._dispatch.open(engine, self._capacities[engine])
        return self._dispatch

    def _work(self, request: GroupRequest, sampling: Sampling) -> GroupWork:
        limit = self.conversation_tokens or request.drawn_by(sampling).max_new_tokens
        return GroupWork(prompt_tokens=len(request.prompt.token_ids), samples=len(request.seeds), limit=limit)

    async def cancel(self, requests: Sequence[GroupRequest]) -> None:
        group_ids = [request.group_id for request in requests]
        self._cancelled.update(group_ids)
        if self._dispatch is not None:
            for group_id in group_ids:
                self._dispatch.drop(group_id)
        await self.present(lambda h: h.cancel.remote(group_ids), "rollouts")

    async def sleep(self, *, keep_weights: bool) -> None:
        await self.present(lambda h: h.sleep.remote(keep_weights=keep_weights), "sleep")

    async def wake(self, part: EnginePart) -> None:
        await self.present(lambda h: h.wake.remote(part), "wake")

    async def stop(self) -> None:
        """Shut down working engines, and end starting engines."""
        self.supervisor = None
        await self.present(lambda h: h.shutdown.remote(), "stop", deadline_s=END_WITHIN_S, limit=STOP_LIMIT)
        self.end()


def _silence(future: asyncio.Future[Any]) -> None:
    """Cancel the wait for a call. Otherwise asyncio logs a failure without a waiting caller."""
    if not future.cancel() and not future.cancelled():
        future.exception()


async def _result(future: asyncio.Future[Any], engine: int) -> Any:
    """Return the result of a call to an engine, or raise its failure in the words of the run."""
    if future.exception() is not None:
        raise await explain(future.exception(), role=RolloutEngines.role, rank=engine, stage="rollouts")
    return future.result()
