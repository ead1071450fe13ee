"""Start lost engines again while the remaining engines work, and give successors the newest weights.

    lost -> closed -> replaced -> given the published weights -> proved -> open

The first call that notices a loss begins the replacement, and later calls join. An engine answers nothing between loss
and proof. A successor loads weights from the memory or the folder of the last publication. The policy overwrites this
publication in the next sync, so no successor loads weights during a sync. A broadcast leaves nothing to load, so with
broadcasts a successor gets the weights in the next sync.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.cluster.waiting import CALL_LIMIT, WAITS, wait_one, within
from actors.roles.group import SpawnOne, WorkerPool, all_results
from actors.rollout.dispatch import Dispatch, EngineCapacity
from actors.rollout.engine_weights import SyncReceipt
from actors.weights import WeightManifest
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import RESUMES, RunError, WorkerLost
from rlhf.roles import PolicyProbe
from rlhf.types import MemoryReport
from rlhf.vision.sight import image_effect

Call = Callable[[ActorHandle[Any]], Any]  # returns the reference to a result
MOST_MISSES = 3  # an engine may fail to find published weights this often


class ReplaceableEngines(WorkerPool):
    """Engines with all losses, and the weights for a successor."""

    def __init__(
        self, handles: Sequence[ActorHandle[Any]], spawn_one: SpawnOne | None = None, *, deadline_s: float
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.is_replaceable = False  # whether a successor can get the weights
        self.gives_published = False  # whether a successor can load the last publication without the policy
        self.opens_weights = False  # whether each engine has an end of a transport to open
        self.unanswered: list[set[int]] = [set() for _ in handles]  # by rank: the groups in progress
        self.spool: Path | None = None  # the store of the present run; None: the store in the spec
        self._dispatch: Dispatch | None = None  # dispatch of requests in flight
        self._capacities: dict[int, EngineCapacity] = {}  # by rank, once an engine has reported its capacity
        self._manifest: WeightManifest | None = None  # of the last sync
        self._published: tuple[WeightManifest, PolicyProbe] | None = None  # None: a successor has nothing to load now
        self._probe: PolicyProbe | None = None  # of the last sync
        self._are_missing = asyncio.Event()  # a successor has found the published weights gone
        self._is_published = asyncio.Event()
        self._loading = asyncio.Lock()  # held while a successor reads the published weights
        self._met: dict[int, ActorHandle[Any]] | None = None  # receivers of a broadcast by rank; None: no broadcast
        self._received: list[ActorHandle[Any]] = []  # engines that loaded the last published weights in their sync
        self._unsynced: dict[int, asyncio.Future[None]] = {}  # by rank: successors that wait for the next broadcast

    def begin_rebuild(self, rank: int, handle: ActorHandle[Any], lost: WorkerLost, *, work: Hashable = None) -> None:
        if self.supervisor is None:
            raise lost
        if not self.is_replaceable:
            reason = (
                "no weights have been sent yet"
                if self._manifest is None
                else "it shares GPUs with the policy, which leaves its successor neither memory nor weights"
            )
            raise RunError(f"{lost.reason} It is not started again, because {reason}. {RESUMES}") from lost
        if self.handles[rank] is handle and rank in self._unsynced:
            self._unsynced.pop(rank).set_exception(lost)
        if self.handles[rank] is not handle or rank in self._rebuilds:
            return
        if not self.gives_published and len(self._rebuilds) == len(self.handles) - 1:
            raise lost  # no engine is left until the next sync, which may wait for the engines
        if self._dispatch is not None:
            self._dispatch.close(rank)
        version = None if self._manifest is None else self._manifest.version
        super().begin_rebuild(rank, handle, lost, work=(lost.stage, version, frozenset(self.unanswered[rank])))

    def _rebuilt(self, rank: int, rebuild: asyncio.Task[None]) -> None:
        super()._rebuilt(rank, rebuild)
        if self._dispatch is None or rebuild.cancelled():
            return
        if (failure := rebuild.exception()) is None:
            self._dispatch.open(rank, self._capacities[rank])
        else:
            self._dispatch.fail(failure)

    async def _replace(self, rank: int) -> None:
        """Start an engine again in the same place, give the engine the weights, and prove the weights."""
        await self._restart(rank)
        self._capacities[rank] = await self.one(self.handles[rank].capacity.remote(), "start", rank=rank)
        if self.spool is not None:
            await self.one(self.handles[rank].renew.remote(self.spool), "start", rank=rank)
        if not self.gives_published:
            await self._await_broadcast(rank)
            return
        if self.opens_weights:
            await self.one(self.handles[rank].open_weights.remote(None, 0), "weight sync", rank=rank)
        await self._give_weights(rank)

    async def _restart(self, rank: int) -> None:
        await super()._replace(rank)

    async def _await_broadcast(self, rank: int) -> None:
        """Wait until a sync has given a successor the weights, and has proved the weights.

        A step may take longer than any call. So RunError is raised only if no worker was called within the limit.
        """
        synced = self._unsynced[rank] = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        try:
            while not synced.done():
                left_s = self.deadline_s - WAITS.idle_s()
                if left_s <= 0.0:
                    raise RunError(
                        f"it has waited {time.monotonic() - began:.0f} s for the next broadcast of weights, and no "
                        f"worker was asked for anything in the last {self.deadline_s:.0f} s ({CALL_LIMIT})"
                    )
                await asyncio.wait([synced], timeout=left_s)
            synced.result()
        finally:
            self._unsynced.pop(rank, None)

    async def _give_weights(self, rank: int) -> None:
        """Give the newest published weights to a successor, and prove the weights."""
        handle, misses, is_given = self.handles[rank], 0, False
        while not is_given:
            try:
                await within(self._is_published.wait(), self.deadline_s)
            except TimeoutError as error:
                raise RunError(f"no weights were published for it in {self.deadline_s:.0f} s ({CALL_LIMIT})") from error
            async with self._loading:
                if self._published is None:
                    continue
                manifest, probe = self._published
                try:
                    receipt: SyncReceipt = await self.one(
                        handle.update_weights.remote(manifest, manifest.version), "weight sync", rank=rank
                    )
                except RunError as error:
                    misses, cause = misses + 1, error.__cause__
                    is_missing = isinstance(cause, RayTaskError) and isinstance(cause.cause, FileNotFoundError)
                    if not is_missing or misses == MOST_MISSES:
                        raise
                    self._withdraw()  # the policy's process has died with its memory, and its successor publishes again
                    self._are_missing.set()
                    continue
                check_receipt(receipt, manifest, engine=rank)
                theirs: list[float] = await self.one(handle.probe.remote(probe.token_ids), "weight sync", rank=rank)
                check_probe(probe.logprobs, theirs, engine=rank, version=probe.version, dtype=probe.dtype)
                is_given = True

    def reachable(self) -> dict[int, ActorHandle[Any]]:
        """Return working engines, and successors waiting for a broadcast, by rank."""
        rebuilt = self._rebuilds.keys() - self._unsynced.keys()
        return {rank: handle for rank, handle in enumerate(self.handles) if rank not in rebuilt}

    async def present(
        self,
        call: Call,
        stage: str,
        *,
        among: Sequence[ActorHandle[Any]] | None = None,
        deadline_s: float | None = None,
        limit: str = CALL_LIMIT,
    ) -> dict[int, Any]:
        """Return the results, by rank, of engines in `among` that work or, as successors, wait for a broadcast."""
        wait = partial(wait_one, role=self.role, stage=stage, deadline_s=deadline_s or self.deadline_s, limit=limit)
        ranks = [rank for rank, handle in enumerate(self.handles) if among is None or handle in among]
        results: list[Any] = await all_results([self._result_if_works(rank, call, wait) for rank in ranks])
        return {rank: result for rank, found in zip(ranks, results, strict=True) for result in found}

    async def together(self, members: Mapping[int, ActorHandle[Any]], call: Call) -> dict[int, Any]:
        """Return the results of all members of a broadcast, by rank. The loss of a member is raised at once.

        Otherwise the remaining members and the policy would wait for the lost member, and nccl would not report the
        loss. A successor of a lost member is not part of the broadcast.
        """
        working = self.reachable()
        for rank, handle in members.items():
            if working.get(rank) is not handle:
                raise self.last_loss[rank]
        calls: list[Awaitable[Any]] = [self.one(call(at), "weight sync", rank=rank) for rank, at in members.items()]
        results = await all_results(calls)
        return dict(zip(members, results, strict=True))

    async def _result_if_works(self, rank: int, call: Call, wait: Callable[..., Awaitable[Any]]) -> tuple[Any, ...]:
        rebuilding, handle = self._rebuilds.get(rank), self.handles[rank]
        if rebuilding is not None and rank not in self._unsynced:
            if rebuilding.done() and not rebuilding.cancelled():
                rebuilding.result()
            return ()
        try:
            return (await wait(call(handle), rank=rank),)
        except WorkerLost as lost:
            self.begin_rebuild(rank, handle, lost)
            return ()

    async def any_working(self) -> int:
        """Return the rank of a working engine, after the first rebuild if none works."""
        while (rank := next((rank for rank in range(len(self.handles)) if rank not in self._rebuilds), None)) is None:
            done, _ = await asyncio.wait(self._rebuilds.values(), return_when=asyncio.FIRST_COMPLETED)
            for rebuild in done:
                rebuild.result()
        return rank

    async def withdraw_weights(self) -> None:
        """Give no successor the published weights from now on, since the policy overwrites the publication."""
        async with self._loading:
            self._withdraw()

    async def weights_are_missing(self) -> None:
        await self._are_missing.wait()

    def offer_weights(self, manifest: WeightManifest) -> None:
        if self._probe is not None and self._probe.version == manifest.version:
            self._published = manifest, self._probe
            self._is_published.set()
            self._are_missing.clear()

    def _withdraw(self) -> None:
        self._published = None
        self._is_published.clear()

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a published set of weights. RunError unless the engines then have the published version and bytes.

        Lost engines are left out: successors load the weights after `prove`. In a broadcast, a member's loss is raised.
        """
        self._manifest = manifest

        def update(handle: ActorHandle[Any]) -> Any:
            return handle.update_weights.remote(manifest, manifest.version)

        met = self._met
        receipts = await (self.present(update, "weight sync") if met is None else self.together(met, update))
        for engine, receipt in receipts.items():
            check_receipt(receipt, manifest, engine=engine)
        self._received = [self.handles[engine] for engine in receipts]

    @property
    def is_elastic(self) -> bool:
        """Return whether engines join and leave. No call then waits for all engines."""
        return self.placement is not None and self.placement.seats is not None

    async def prove(self, probe: PolicyProbe) -> float | None:
        """Compare the engines' log-probabilities with the policy's, and return the largest difference.

        In flight, lost engines are left out, also if only a sync can give weights to a lost engine. None: no engine
        works. In all other cases the call waits for the successors of lost engines, as the next batch would. The
        difference is then the same as without a loss.
        """
        assert self._manifest is not None
        self._probe = probe
        self.offer_weights(self._manifest)

        def ask(handle: ActorHandle[Any]) -> Any:
            return handle.probe.remote(probe.token_ids)

        if not self.is_elastic and self._dispatch is None and (self.gives_published or not self.is_replaceable):
            found = dict(enumerate(await self.each(ask, "weight sync")))
        else:
            found = await self.present(ask, "weight sync", among=self._received)
        differences = [
            check_probe(probe.logprobs, theirs, engine=engine, version=probe.version, dtype=probe.dtype)
            for engine, theirs in found.items()
        ]
        for engine in found.keys() & self._unsynced.keys():
            if self.handles[engine] in self._received:  # and no successor of this engine waits
                self._unsynced.pop(engine).set_result(None)
        return max(differences, default=None)

    async def image_effect(self, token_ids: Sequence[int], other_ids: Sequence[int]) -> float | None:
        """Return the smallest effect, of all engines, of the images of `other_ids` on log-probabilities. None: no
        engine works."""
        own = await self._probed(tuple(token_ids))
        other = await self._probed(tuple(other_ids))
        effects = [image_effect(own[engine], other[engine], token_ids) for engine in own.keys() & other.keys()]
        return min(effects, default=None)

    async def _probed(self, token_ids: tuple[int, ...]) -> dict[int, list[float]]:
        return await self.present(lambda h: h.probe.remote(token_ids), "weight sync", among=self._received)

    async def start_profile(self) -> None:
        await self.present(lambda h: h.start_profile.remote(), "profile")

    async def stop_profile(self, folder: Path) -> None:
        paths = {handle: folder / f"{self.role}-{rank}" for rank, handle in enumerate(self.handles)}
        await self.present(lambda h: h.stop_profile.remote(paths[h]), "profile", among=list(paths))

    async def memory(self) -> MemoryReport:
        """Return the memory peaks of the largest working engine."""
        while not (reports := await self.present(lambda h: h.memory.remote(), "memory")):
            await self.any_working()
        gpus = [report.gpu_gib for report in reports.values() if report.gpu_gib is not None]
        rss_gib = max(report.rss_gib for report in reports.values())
        return MemoryReport(rss_gib=rss_gib, gpu_gib=max(gpus) if gpus else None)


def check_receipt(receipt: SyncReceipt, manifest: WeightManifest, *, engine: int) -> None:
    if (receipt.version, receipt.checksum) != (manifest.version, manifest.checksum):
        raise RunError(
            f"weight sync: rollout engine {engine} has version {receipt.version} with checksum "
            f"{receipt.checksum}; the policy published version {manifest.version} with {manifest.checksum}. "
            "The run stops before it samples from weights that are not the policy's."
        )
