"""The rollout role: distributes prompts among vLLM engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.cluster.actor_locations import lost_nodes
from actors.cluster.placement import Placement
from actors.cluster.waiting import RESUMES, explain
from actors.roles.gang import PolicyGang
from actors.roles.group import END_WITHIN_S, WorkerGroup
from actors.rollout.dispatch import Dispatch, GroupWork, shares
from actors.rollout.engine_actor import RolloutSpec, RolloutWorker, engine_environment
from actors.weights import SENDERS, WeightManifest
from rlhf.config.derive import WeightSync, saved_rank, ships_adapter, weight_sync
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.root import Config
from rlhf.engine.memory import peak_memory
from rlhf.errors import RunError
from rlhf.models.on_disk import ModelOnDisk
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, EnginePart
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import GroupRequest, MemoryReport, RolloutInfo, Sampling

logger = logging.getLogger(__name__)

ASKED_AT_ONCE = 10_000  # calls queued in an engine's actor; vLLM has a separate queue


class RolloutEngine(RolloutWorker):
    """One engine as a Ray actor."""

    async def memory(self) -> MemoryReport:
        """Return the peaks of this process and, on GPUs, of the engine's workers, possibly in other processes."""
        return MemoryReport(rss_gib=peak_memory().rss_gib, gpu_gib=await self.gpu_peak_gib())


def start_engines(
    config: Config,
    placement: Placement,
    *,
    max_model_len: int,
    spool: Path,
    environment: EnvironmentSpec | None,
) -> RolloutEngines:
    """Create the engines' actors. Their models are not loaded yet, and they wait for the policy's weights."""
    policy, role, lora = config.policy, config.cluster.roles.rollout, config.policy.lora
    assert config.rollouts is not None
    rollouts, in_flight = config.rollouts, config.rollouts.weight_updates == "in_flight"
    sync = weight_sync(config.cluster, one_host=placement.on_one_host())
    spec = RolloutSpec(
        model=policy.model,
        tokenizer=policy.tokenizer,
        dtype=policy.dtype,
        max_model_len=max_model_len,
        transport=sync.method,
        sender_address=None if placement.on_one_host() else placement.addresses_of(PolicyGang.role)[0],
        lora_rank=saved_rank(lora) if lora is not None and ships_adapter(config) else None,
        colocated=role.colocate_with is not None,
        trust_remote_code=policy.trust_remote_code,
        spool=spool,
        spools_failures=rollouts.max_staleness > 0,
        carries_over=rollouts.carry_over,
        kv_after_update=rollouts.kv_after_update if in_flight else None,
        environment=environment,
    )
    return RolloutEngines(
        _spawn(spec, config.cluster, placement),
        sync,
        deadline_s=config.cluster.call_timeout_s,
        tensor_parallel=role.tensor_parallel,
        conversation_tokens=None if environment is None else environment.max_tokens,
    )


def serve_engines(
    model: ModelOnDisk,
    cluster: ClusterConfig,
    placement: Placement,
    *,
    max_model_len: int,
    environment: EnvironmentSpec | None = None,
) -> RolloutEngines:
    """Create frozen engines for a model on disk. They are not started and cannot be synced."""
    spec = RolloutSpec(
        model=model.base,
        tokenizer=model.tokenizer,
        dtype=model.dtype,
        max_model_len=max_model_len,
        transport=None,
        adapter=model.adapter,
        lora_rank=model.lora_rank,
        trust_remote_code=model.trust_remote_code,
        environment=environment,
    )
    return RolloutEngines(_spawn(spec, cluster, placement), None, deadline_s=cluster.call_timeout_s)


def _spawn(common: RolloutSpec, cluster: ClusterConfig, placement: Placement) -> list[ActorHandle[Any]]:
    """Create one actor for each slot. The cluster and the slot add their settings to the common ones."""
    role = cluster.roles.rollout
    remote = ray.remote(RolloutEngine)
    handles = []
    for rank, threads in enumerate(placement.threads(RolloutEngines.role, role.threads)):
        spec = replace(
            common,
            name=f"rollout engine {rank}",
            max_num_seqs=role.max_num_seqs,
            device=cluster.device,
            threads=threads,
            kv_cache_gib=float(role.kv_cache_gib) if cluster.device == "cpu" else None,
            gpu_memory_utilization=role.gpu_memory_utilization,
            tensor_parallel=role.tensor_parallel,
            enforce_eager=role.enforce_eager or cluster.device == "cpu",
            start_timeout_s=cluster.start_timeout_s,
            call_timeout_s=cluster.call_timeout_s,
        )
        options = placement.options(RolloutEngines.role, rank, engine_environment(spec), concurrency=ASKED_AT_ONCE)
        handles.append(remote.options(**options).remote(spec))
    return handles


class RolloutEngines(WorkerGroup):
    """All engines of a run. `sync` is the transport of the policy's weights, or None for frozen engines.

    `generate` distributes requests by their order and their largest size, and an engine starts its share in one step. A
    batch of the same requests under the same weights is therefore always scheduled and rounded alike. `answer`
    distributes them by the engines' outstanding work.

    conversation_tokens: most tokens of a conversation; None: one turn answers a prompt.
    """

    role: Role = "rollout"

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        sync: WeightSync | None,
        *,
        deadline_s: float,
        tensor_parallel: int = 1,
        conversation_tokens: int | None = None,
    ) -> None:
        super().__init__(handles, deadline_s=deadline_s)
        self.sync = sync
        self.tensor_parallel = tensor_parallel
        self.conversation_tokens = conversation_tokens
        self._cancelled: set[int] = set()  # groups that a running `generate` or `answer` must not return
        self._dispatch: Dispatch | None = None  # of `answer`
        self._asking = asyncio.Lock()

    async def connect(self, policy: PolicyGang, *, adapter: Path | None) -> None:
        """Open both ends of the weight transport.

        adapter: the folder through which an adapter alone travels. It must be visible to the policy and to engines on
        all hosts. None: all weights travel.
        """
        assert self.sync is not None, "frozen engines are not connected to a policy"
        engines, parallel = len(self.handles), self.tensor_parallel
        if adapter is not None:
            logger.info("the adapter goes through %s", adapter)
            await policy.open_weights(self.sync.method, None, adapter, num_engines=engines)
            return
        logger.info("weights go by %s: %s", self.sync.method, self.sync.why)
        meeting = None
        if SENDERS[self.sync.method].meets:
            meeting = await policy.meeting(num_receivers=engines * parallel, timeout_s=self.deadline_s)
        opened = [h.open_weights.remote(meeting, 1 + engine * parallel) for engine, h in enumerate(self.handles)]
        await asyncio.gather(
            policy.open_weights(self.sync.method, meeting, None, num_engines=engines),
            self.all(opened, "weight sync"),
        )

    async def renew(self, spool: Path) -> bool:
        """Prepare the engines for another run. Return False if one of them still works for the last run."""
        return all(await self.all([h.renew.remote(spool) for h in self.handles], "start"))

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        """Answer all requests except for cancelled ones, and yield groups as they are completed.

        The first failure ends the wait. It may be a request refused by its engine before the batch starts.
        """
        places = shares([self._work(request, sampling) for request in requests], len(self.handles))
        by_engine = [[requests[place] for place in own] for own in places]
        await self.all([h.hold.remote() for h in self.handles], "rollouts")
        columns: dict[int, Any] = {}
        waits: dict[asyncio.Future[Any], tuple[GroupRequest, int]] = {}
        for engine, (handle, share) in enumerate(zip(self.handles, by_engine, strict=True)):
            for request in share:
                rollouts, scalars = handle.generate.options(num_returns=2).remote(request, sampling, version)
                columns[request.group_id] = rollouts
                waits[asyncio.wrap_future(scalars.future())] = (request, engine)
        releases = {
            asyncio.wrap_future(handle.release.remote(len(share)).future()): engine
            for engine, (handle, share) in enumerate(zip(self.handles, by_engine, strict=True))
        }
        finished: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        for future in (*waits, *releases):
            future.add_done_callback(finished.put_nowait)
        try:
            while waits or releases:
                try:
                    async with asyncio.timeout(self.deadline_s):
                        done = {await finished.get()}
                except TimeoutError as error:
                    stuck = sorted({*releases.values(), *(engine for _, engine in waits.values())})
                    raise RunError(
                        f"rollouts: engines {stuck} finished none of their {len(waits)} prompts in "
                        f"{self.deadline_s:.0f} s (cluster.call_timeout_s).{lost_nodes()} {RESUMES}"
                    ) from error
                while not finished.empty():
                    done.add(finished.get_nowait())
                for future in sorted(done & waits.keys(), key=lambda f: waits[f][0].group_id):
                    request, engine = waits.pop(future)
                    infos: tuple[RolloutInfo, ...] | None = _result(future, engine)
                    if infos is None or request.group_id in self._cancelled:
                        continue
                    yield CompletedGroup(request=request, rollouts=columns[request.group_id], infos=infos)
                for future in done & releases.keys():
                    _result(future, releases.pop(future))
        finally:
            for future in (*waits, *releases):
                _silence(future)
            self._cancelled.difference_update(columns)

    async def answer(
        self, request: GroupRequest, sampling: Sampling, *, oldest: int, urgent: bool = False
    ) -> CompletedGroup | None:
        """Answer one request by whatever weights the engines have. None: it was cancelled.

        The request waits here while all engines are full. Then the least loaded engine gets it, with all its samples.
        """
        self._cancelled.discard(request.group_id)
        dispatch = await self._dispatching()
        if request.group_id in self._cancelled:
            return None
        slot = await dispatch.enter(request.group_id, self._work(request, sampling), urgent=urgent)
        if slot is None:
            return None
        infos: tuple[RolloutInfo, ...] | None = None
        try:
            if request.group_id not in self._cancelled:
                handle = self.handles[slot.engine]
                rollouts, scalars = handle.answer.options(num_returns=2).remote(request, sampling, oldest)
                infos = await self._answered(asyncio.wrap_future(scalars.future()), slot.engine, dispatch)
        finally:
            dispatch.leave(slot, [info.num_tokens_after_prompt for info in infos or ()])
        if infos is None or request.group_id in self._cancelled:
            return None
        return CompletedGroup(request=request, rollouts=rollouts, infos=infos)

    async def _answered(self, future: asyncio.Future[Any], engine: int, dispatch: Dispatch) -> Any:
        """Return the result of a group. RunError if its engine finishes no group within the deadline."""
        try:
            while not future.done():
                left_s = self.deadline_s - dispatch.quiet_s(engine)
                if left_s <= 0.0:
                    raise RunError(
                        f"rollouts: engine {engine} finished none of its prompts in {self.deadline_s:.0f} s "
                        f"(cluster.call_timeout_s).{lost_nodes()} {RESUMES}"
                    )
                await asyncio.wait([future], timeout=left_s)
            return _result(future, engine)
        finally:
            _silence(future)

    async def _dispatching(self) -> Dispatch:
        """Return the dispatch. The first call asks the engines for their capacities."""
        async with self._asking:
            if self._dispatch is None:
                self._dispatch = Dispatch(await self.all([h.capacity.remote() for h in self.handles], "rollouts"))
        return self._dispatch

    def _work(self, request: GroupRequest, sampling: Sampling) -> GroupWork:
        limit = request.drawn_by(sampling).max_new_tokens
        return GroupWork(
            prompt_tokens=len(request.prompt.token_ids),
            samples=len(request.seeds),
            limit=limit if self.conversation_tokens is None else self.conversation_tokens,
        )

    async def cancel(self, requests: Sequence[GroupRequest]) -> None:
        group_ids = [request.group_id for request in requests]
        self._cancelled.update(group_ids)
        if self._dispatch is not None:
            for group_id in group_ids:
                self._dispatch.drop(group_id)
        await self.all([h.cancel.remote(group_ids) for h in self.handles], "rollouts")

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a published set of weights. RunError unless the engines then have its version and its bytes."""
        receipts = await self.all(
            [h.update_weights.remote(manifest, manifest.version) for h in self.handles], "weight sync"
        )
        for engine, receipt in enumerate(receipts):
            if (receipt.version, receipt.checksum) != (manifest.version, manifest.checksum):
                raise RunError(
                    f"weight sync: rollout engine {engine} has version {receipt.version} with checksum "
                    f"{receipt.checksum}; the policy published version {manifest.version} with {manifest.checksum}. "
                    "The run stops before it samples from weights that are not the policy's."
                )

    async def probe(self, token_ids: Sequence[int]) -> list[list[float]]:
        return await self.all([h.probe.remote(tuple(token_ids)) for h in self.handles], "weight sync")

    async def sleep(self, *, keep_weights: bool) -> None:
        await self.all([h.sleep.remote(keep_weights=keep_weights) for h in self.handles], "sleep")

    async def wake(self, part: EnginePart) -> None:
        await self.all([h.wake.remote(part) for h in self.handles], "wake")

    async def stop(self) -> None:
        """Shut the engines down in order."""
        await self.all([h.shutdown.remote() for h in self.handles], "stop", deadline_s=END_WITHIN_S)
        self.end()


def _silence(future: asyncio.Future[Any]) -> None:
    """Give a call up. Otherwise asyncio logs a failure that nobody waits for."""
    if not future.cancel() and not future.cancelled():
        future.exception()


def _result(future: asyncio.Future[Any], engine: int) -> Any:
    """Return the result of a call to an engine, or raise its failure in the words of the run."""
    if future.exception() is not None:
        raise explain(future.exception(), role=RolloutEngines.role, rank=engine, stage="rollouts")
    return future.result()
