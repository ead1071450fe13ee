"""The gang of ranks for many adapters of one base model, or for one whole model (rlhf.roles.AdaptersRole)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ray import ObjectRef

from actors.cluster.placement import Placement
from actors.cluster.waiting import put
from actors.roles.collecting import WaitingCalls
from actors.roles.gang import Gang
from actors.roles.group import spawn
from actors.weights.adapter import WEIGHTS, file_checksum
from actors.weights.files import files_checksum, mapped_files
from rlhf.adapters import AdamStep, AdapterCall, AdapterShape, LossReport, LossRows, NamedLoss
from rlhf.config.schema.root import Config
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import AdaptersLost, Preempted, RunError, WorkerLost
from rlhf.role_table import Role
from rlhf.types import MemoryReport
from rlhf.workers.adapters.adapter_worker import AdapterWorker, Outcome, RowsReport, merged_outcome, merged_report
from rlhf.workers.adapters.whole_worker import WholeWorker

logger = logging.getLogger(__name__)


class AdapterRank(AdapterWorker):
    """One rank as an actor."""

    def export_adapter(self, name: str, folder: Path) -> str | None:  # type: ignore[override]
        """Write the adapter. Return the checksum of the weights' file; None on all ranks but 0. Collective."""
        super().export_adapter(name, folder)
        return file_checksum(folder / WEIGHTS) if self.place.rank == 0 else None


class WholeRank(WholeWorker):
    """One rank as an actor, for all weights of one model."""

    def export_adapter(self, name: str | None, folder: Path) -> str | None:  # type: ignore[override]
        """Write the model. Return the checksum of the weights' files; None on all ranks but 0. Collective."""
        super().export_adapter(name, folder)
        return files_checksum(mapped_files(folder)) if self.place.rank == 0 else None


class AdapterRanks(Gang):
    """The ranks, started, ended and measured like any gang."""

    role: Role = AdapterWorker.role


class AdaptersGang:
    """Implements rlhf.roles.AdaptersRole. A call goes to all ranks at once, for the same order of calls on all ranks.

    The adapters are in the memory of the ranks: a lost rank ends them all. Then all ranks are started again, once for
    all calls lost with them. A call for an adapter of the lost ranks never reaches the new ranks.
    """

    supervisor: Supervisor | None = None  # None: a lost rank ends the work

    def __init__(self, ranks: AdapterRanks, *, packed_tokens: int = 0) -> None:
        """`packed_tokens`: of calls of forward_backward in one pass. 0: each call has a separate pass."""
        self.ranks = ranks
        self._packed_tokens = packed_tokens
        self._packing: WaitingCalls[AdapterCall, LossReport] | None = None
        self._held: set[str] = set()
        self._lost: dict[str, WorkerLost] = {}  # by adapter: how its ranks were lost
        self._loss: WorkerLost | None = None  # the last
        self._restart: asyncio.Task[None] | None = None  # after the last loss

    async def start(self, *, deadline_s: float) -> None:
        """Connect the ranks and load the base model."""
        await self.ranks.start(deadline_s=deadline_s)
        if self._packed_tokens and self._packing is None:
            if all(await self.ranks.each(lambda h: h.can_pack.remote(), "start")):
                self._packing = WaitingCalls(self._carry_out, fits=self._fits)
            else:
                logger.warning(
                    "The adapters take turns, because packed passes need ZeRO stage 0 and a model with packed rows."
                )

    def holds(self, adapter: str) -> bool:
        return adapter in self._held

    def forgive(self, losses: Sequence[WorkerLost]) -> None:
        if self.supervisor is not None:
            self.supervisor.forgive(losses)

    async def _each(self, adapters: Collection[str], send: Callable[[Any], ObjectRef[Any]], stage: str) -> list[Any]:
        """Call all ranks. `adapters`: adapters that must be on the ranks for the call."""
        await self._restarted()
        if gone := [adapter for adapter in adapters if adapter in self._lost]:
            raise AdaptersLost(self._lost[gone[0]])
        before = self._loss
        try:
            results = await self.ranks.each(send, stage)
        except WorkerLost as lost:
            if self.supervisor is None or self.ranks.processes.ended:
                raise
            if self._loss is before:
                self._lost |= dict.fromkeys(self._held, lost)
                self._held.clear()
                self._loss, self._restart = lost, asyncio.create_task(self._recover(self.supervisor, lost))
        except RunError:  # raised by a peer of the lost rank
            if self._loss is before:
                raise
        if self._loss is before:
            return results
        await self._restarted()
        assert self._loss is not None
        raise AdaptersLost(self._loss)

    async def _restarted(self) -> None:
        """Wait for the end of a restart. Raise the failure of the restart."""
        if self._restart is not None:
            await asyncio.shield(self._restart)

    async def _recover(self, supervisor: Supervisor, lost: WorkerLost) -> None:
        try:
            await supervisor.recover(lost, self.ranks.restart)
        except WorkerLost:
            raise
        except (RunError, Preempted) as error:  # no request can be answered without ranks
            raise WorkerLost(str(error), role=lost.role, rank=lost.rank, stage=lost.stage, kind=lost.kind) from error

    async def create(self, adapter: str, shape: AdapterShape) -> None:
        await self._each((), lambda h: h.create.remote(adapter, shape), "update")
        self._lost.pop(adapter, None)
        self._held.add(adapter)

    async def remove(self, adapter: str) -> None:
        self._held.discard(adapter)
        await self._each([adapter], lambda h: h.remove.remote(adapter), "update")

    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        call = AdapterCall(adapter=adapter, rows=rows, loss=loss)
        if self._packing is not None and not forward_only:
            return await self._packing.call(call)
        return await self._carry_out_alone(call, forward_only=forward_only)

    async def _carry_out_alone(self, call: AdapterCall, *, forward_only: bool = False) -> LossReport:
        adapter, stored, loss = call.adapter, put(call.rows), call.loss
        reports: list[RowsReport] = await self._each(
            [adapter], lambda h: h.forward_backward.remote(adapter, stored, loss, forward_only=forward_only), "update"
        )
        return merged_report(reports)

    async def _carry_out(self, calls: Sequence[AdapterCall]) -> Sequence[LossReport | BaseException]:
        if len(calls) == 1:
            return [await self._carry_out_alone(calls[0])]
        stored = put(calls)
        of_ranks: list[list[Outcome]] = await self._each(
            [call.adapter for call in calls], lambda h: h.forward_backward_packed.remote(stored), "update"
        )
        return [merged_outcome(outcomes) for outcomes in zip(*of_ranks, strict=True)]

    def _fits(self, calls: Sequence[AdapterCall]) -> bool:
        """Return whether calls fit into one pass: at most one call per adapter, and rows with their last targets within
        the limit of tokens."""
        num_tokens = sum(len(call.rows.token_ids) + len(call.rows.lengths) for call in calls)
        return num_tokens <= self._packed_tokens and len({call.adapter for call in calls}) == len(calls)

    async def drop_gradient(self, adapter: str, reason: str) -> None:
        await self._each([adapter], lambda h: h.drop_gradient.remote(adapter, reason), "update")

    async def optim_step(self, adapter: str, step: AdamStep) -> float:
        norms: list[float] = await self._each([adapter], lambda h: h.step_adapter.remote(adapter, step), "update")
        return norms[0]

    async def save(self, adapter: str, folder: Path) -> None:
        await self._each([adapter], lambda h: h.save_adapter.remote(adapter, folder), "checkpoint")

    async def load(self, adapter: str, folder: Path, *, optimizer: bool) -> None:
        await self._each([adapter], lambda h: h.load_adapter.remote(adapter, folder, optimizer=optimizer), "resume")

    async def export(self, adapter: str | None, folder: Path) -> str:
        held = () if adapter is None else (adapter,)
        checksums: list[str] = await self._each(held, lambda h: h.export_adapter.remote(adapter, folder), "export")
        return checksums[0]

    async def probe(self, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
        ids = list(token_ids)
        results: list[list[float]] = await self._each(
            () if adapter is None else [adapter], lambda h: h.probe_adapter.remote(adapter, ids), "probe"
        )
        return results[0]

    async def memory(self) -> MemoryReport:
        return await self.ranks.memory()

    async def stop(self) -> None:
        await self.ranks.stop()

    def end(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
        self.ranks.end()


def create_adapters_gang(
    config: Config,
    placement: Placement,
    *,
    longest_sequence: int,
    packed_tokens: int = 0,
    images: Path | None = None,
) -> AdaptersGang:
    """Create the actors of the ranks. Call `start` next. `config`: from rlhf.config.adapter_ranks.ranks_config.

    `packed_tokens`: calls of forward_backward waiting at the same time go together up to so many tokens. The caller
    must then await each call for an adapter before the next. `images`: the folder of the rows' images.
    """
    spawned = spawn(
        config.cluster,
        placement,
        AdapterRanks.role,
        WholeRank if config.policy.lora is None else AdapterRank,
        config,
        optimizer_steps=1,
        longest_sequence=longest_sequence,
        images=images,
    )
    ranks = AdapterRanks(*spawned, deadline_s=config.cluster.call_timeout_s, one_host=placement.on_one_host())
    ranks.placement = placement
    return AdaptersGang(ranks, packed_tokens=packed_tokens)
