"""Manage gangs of trained ranks. After the loss of one rank, all ranks are started again (rlhf.controller.loop).

The Protocols in rlhf.roles describe the methods. Each method calls all ranks, even for a single result, since the ranks
compute and gather together.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray.util
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.cluster.memory_folders import MemoryFolders
from actors.cluster.waiting import START_LIMIT
from actors.roles.group import END_WITHIN_S, STOP_LIMIT, ModelGroup, SpawnOne
from actors.weights import Meeting, Transport, WeightManifest
from rlhf.errors import RESUMES, RunError
from rlhf.role_table import Role
from rlhf.roles import (
    AdvantagesReport,
    Arithmetic,
    CompletedGroup,
    GivenByRank,
    Metrics,
    PrepareReport,
    Ref,
    RemoteColumns,
    StatesByRank,
)
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.types import BatchPlan, Examples, MinibatchPlan, OwnLoss, Pairs, TokenSignals, TokenValues, VocabularyHead

T = TypeVar("T")
BROADCAST_LIMIT_S = 110.0  # for a broadcast of weights: a lost member is noticed within two minutes
PORTS = range(20_000, 32_768)  # Linux gives these ports to no outgoing connection


def free_address(actor: object, one_host: bool) -> tuple[str, int]:
    """Return a free port of the actor's node, and the node's address. On one host, the address is loopback."""
    host = "127.0.0.1" if one_host else ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in secrets.SystemRandom().sample(PORTS, k=len(PORTS)):
        with socket.socket(family) as probe, suppress(OSError):
            probe.bind((host, port))
            return host, port
    raise RunError(f"No port from {PORTS.start} to {PORTS.stop - 1} is free on {host}.")


class Gang(ModelGroup):
    """Ranks 0 to n - 1 of one role, with the methods common to all trained roles."""

    updating = "update"  # the name of this stage in messages

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        spawn_one: SpawnOne | None = None,
        *,
        deadline_s: float,
        one_host: bool,
        sequence_parallel: int = 1,
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.one_host = one_host
        self.sequence_parallel = sequence_parallel
        self.folders: MemoryFolders | None = None  # for snapshots; None: the ranks take no snapshots
        self._nodes: dict[str, str] = {}  # node of each rank at the last start, by the rank's name
        self._copied_among: frozenset[str] | None = None  # the run's nodes when the places of copies were chosen
        self._snapshot_calls: dict[int, list[ObjectRef[Any]]] = {}  # sent calls of `take_snapshot`, by step
        self.heads: dict[str, Ref[VocabularyHead]] = {}  # heads of the teachers

    @property
    def num_ranks(self) -> int:
        """Return the number of data-parallel ranks."""
        return len(self.handles) // self.sequence_parallel

    def distinct(self, results: Sequence[T]) -> Sequence[T]:
        """Return a result for each data-parallel rank. Ranks that share micro-batches return equal results."""
        return results[:: self.sequence_parallel]

    async def start(self, *, deadline_s: float) -> None:
        """Connect the ranks and load the model. Sets `fingerprint` from the model's architecture."""
        self.start_deadline_s = deadline_s
        await self.processes.wait_until_started(deadline_s=deadline_s)
        host, port = await self._address("start", deadline_s=deadline_s, limit=START_LIMIT)
        starts = [h.start.remote(host, port) for h in self.handles]
        self.fingerprint: str = (await self.all(starts, "start", deadline_s=deadline_s, limit=START_LIMIT))[0]
        if self.folders is not None and self.placement is not None:
            self._copied_among = None
            nodes = self.placement.nodes_of(self.role)
            folders = await self.folders.open(nodes)
            self._nodes = {f"{self.role}-{rank}": node for rank, node in enumerate(nodes)}
            opened = [
                handle.open_snapshots.remote(folder / name, self.folders.copies_of(name))
                for handle, folder, name in zip(self.handles, folders, self._nodes, strict=True)
            ]
            await self.all(opened, "start", deadline_s=deadline_s, limit=START_LIMIT)

    async def restart(self) -> None:
        """End all ranks, start new ranks in their places, and give the new ranks everything that the first ranks
        received."""
        assert self._spawn_one is not None
        ranks = range(len(self.handles))
        self._snapshot_calls.clear()
        await asyncio.gather(*map(self.processes.end_one, ranks))
        if self.placement is not None:
            await self.placement.wait_until_whole(limit_s=self.start_deadline_s)
        for rank in ranks:
            self.handles[rank] = self._spawn_one(rank)
        await self.start(deadline_s=self.start_deadline_s)
        for name, head in self.heads.items():
            await self.take_teacher(name, head)

    async def take_snapshot(self, step: int) -> None:
        if self.folders is not None and self.folders.nodes() != self._copied_among:
            await self._choose_places({})
        calls = self._snapshot_calls.pop(step, None) or self._send_snapshot(step)
        failures: list[str | None] = await self.all(calls, "snapshot")
        if any(failures):
            await self._choose_places({name: why for name, why in zip(self._nodes, failures, strict=True) if why})

    def _send_snapshot(self, step: int) -> list[ObjectRef[Any]]:
        return [h.take_snapshot.remote(step) for h in self.handles]

    async def _choose_places(self, failures: Mapping[str, str]) -> None:
        """Give each rank another node for copies of snapshots. `failures` has the reasons of failed copies."""
        if self.folders is None:
            return
        self._copied_among = self.folders.nodes()
        places = await self.folders.places(self._nodes, failures)
        copies = [h.send_snapshots_to.remote(places[name]) for h, name in zip(self.handles, self._nodes, strict=True)]
        await self.all(copies, "snapshot")

    async def newest_snapshot(self) -> int | None:
        steps: list[int | None] = await self.each(lambda h: h.newest_snapshot.remote(), "snapshot")
        known = [step for step in steps if step is not None]
        return min(known) if len(known) == len(steps) else None

    async def restore_snapshot(self, step: int) -> None:
        await self._choose_places({})
        await self.each(lambda h: h.restore_snapshot.remote(step), "snapshot")

    async def save_snapshots(self, step: int, folder: Path) -> None:
        if self.folders is None:
            raise RunError("The ranks take no snapshots, so no checkpoint can be written from memory.")
        folder.mkdir()
        await self.folders.write(self._nodes, step, folder)

    async def _address(self, stage: str, **limits: Any) -> tuple[str, int]:
        """Return an address for meeting rank 0."""
        address: tuple[str, int] = await self.one(
            self.handles[0].__ray_call__.remote(free_address, self.one_host), stage, **limits
        )
        return address

    async def take_teacher(self, name: str, head: Ref[VocabularyHead]) -> None:
        self.heads[name] = head
        await self.all([h.take_teacher.remote(name, head) for h in self.handles], "start")

    async def _columns(
        self, methods: Sequence[Any], arguments: Sequence[Sequence[Any]], stage: str
    ) -> list[tuple[Ref[Any], Any]]:
        """Call methods that return a column and a small result. Return the column and the result of each data-parallel
        rank."""
        calls = zip(methods, arguments, strict=True)
        refs = [method.options(num_returns=2).remote(*own) for method, own in calls]
        results = await self.all([ref for _, ref in refs], stage)
        return list(self.distinct([(column, result) for (column, _), result in zip(refs, results, strict=True)]))

    def _by_rank(self, plan: BatchPlan, columns: Sequence[RemoteColumns[Any]]) -> list[list[Ref[Any]]]:
        """Return the references for each rank to fetch, in the given order. A rank fetches only columns with its
        sequences."""
        receivers: dict[int, set[int]] = {}
        for rank in range(self.num_ranks):
            for sequence_id in plan.received_by(rank):
                receivers.setdefault(sequence_id, set()).add(rank)
        refs: list[list[Ref[Any]]] = [[] for _ in range(self.num_ranks)]
        for column in columns:
            for rank in set().union(*(receivers.get(i, ()) for i in column.sequence_ids)):
                refs[rank].append(column.ref)
        return [refs[rank // self.sequence_parallel] for rank in range(len(self.handles))]

    def _shares(self, plan: BatchPlan, columns: Sequence[RemoteColumns[Any]]) -> list[tuple[Any, ...]]:
        """Return the rank's plan and the references for each rank to fetch."""
        plans = [plan.for_rank(rank) for rank in range(self.num_ranks)]
        refs = enumerate(self._by_rank(plan, columns))
        return [(plans[rank // self.sequence_parallel], *own) for rank, own in refs]

    async def _step(
        self,
        methods: Sequence[Any],
        inputs: StatesByRank | GivenByRank,
        stage: str,
        *args: Any,
        snapshot: int | None = None,
        **options: Any,
    ) -> Metrics:
        """Call a method of each rank, with the teacher's states or the given responses of the rank, if any. Merge the
        metrics. `snapshot`: the step of which the ranks take a snapshot right afterwards."""
        refs = [
            method.remote(*args, *(inputs[rank // self.sequence_parallel] if inputs else ()), **options)
            for rank, method in enumerate(methods)
        ]
        if snapshot is not None:
            self._snapshot_calls[snapshot] = self._send_snapshot(snapshot)
        return merge_metrics(self.distinct(await self.all(refs, stage)))

    async def optim_step(self) -> Metrics:
        return await self._step([h.optim_step for h in self.handles], (), self.updating)

    async def save(self, folder: Path) -> None:
        await self.all([h.save.remote(folder) for h in self.handles], "checkpoint")

    async def load(self, folder: Path) -> None:
        await self.all([h.load.remote(folder) for h in self.handles], "resume")

    async def export(self, folder: Path) -> None:
        await self.all([h.export.remote(folder) for h in self.handles], "export")

    async def arithmetic(self) -> Arithmetic:
        """Return the summed peak FLOPS of all ranks, measured at the same time, since ranks may share a machine."""
        reports: list[Arithmetic] = await self.all([h.arithmetic.remote() for h in self.handles], "start")
        return replace(reports[0], peak_flops=sum(report.peak_flops for report in reports))

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Compute the probe on all ranks, since the weights may be sharded."""
        results: list[list[float]] = await self.each(lambda h: h.probe.remote(tuple(token_ids)), "probe")
        return results[0]

    async def stop(self) -> None:
        if not self.processes.ended:
            stops = [h.stop.remote() for h in self.handles]
            await self.all(stops, "stop", deadline_s=END_WITHIN_S, limit=STOP_LIMIT)
            self.end()


def _by_sequence(plan: BatchPlan, columns: Sequence[tuple[Ref[T], Any]]) -> list[RemoteColumns[T]]:
    """Return one column per data-parallel rank, with the rank's sequences of a plan."""
    return [RemoteColumns(ref=column, sequence_ids=plan.sequences_of(rank)) for rank, (column, _) in enumerate(columns)]


class PolicyGang(Gang):
    """The ranks of an online run's policy."""

    role: Role = "policy"
    reconnect: Callable[[], Awaitable[None]] | None = None  # connects new ranks to the engines; None: there are none

    async def restart(self) -> None:
        await super().restart()
        if self.reconnect is not None:
            await self.reconnect()

    async def meeting(self, *, num_receivers: int, timeout_s: float) -> Meeting:
        """Return the address at which rank 0 waits for the receivers of a broadcast. The wait for a lost or hanging
        receiver lasts until the limit, at most BROADCAST_LIMIT_S."""
        host, port = await self._address("weight sync")
        limit_s = min(timeout_s, BROADCAST_LIMIT_S)
        return Meeting(address=host, port=port, num_receivers=num_receivers, timeout_s=limit_s)

    async def open_weights(
        self, transport: Transport, meeting: Meeting | None, adapter: Path | None, *, num_engines: int
    ) -> None:
        """Open the ranks' ends of the weight transport. A broadcast blocks here until all receivers have connected."""
        await self.each(lambda h: h.open_weights.remote(transport, meeting, adapter, num_engines), "weight sync")

    async def prepare(
        self, plan: BatchPlan, groups: Sequence[CompletedGroup], columns: Sequence[RemoteColumns[Any]]
    ) -> PrepareReport:
        shares = self._shares(plan, [*(group.columns for group in groups), *columns])
        refs = [handle.prepare.remote(*share) for handle, share in zip(self.handles, shares, strict=True)]
        reports = self.distinct(await self.all(refs, "experience"))
        return PrepareReport(
            sequences=tuple(s for sequences, _ in reports for s in sequences),
            metrics=merge_metrics(metrics for _, metrics in reports),
        )

    async def set_advantages(
        self, plan: BatchPlan, by_sequence: Mapping[int, float] | None, values: Sequence[RemoteColumns[TokenValues]]
    ) -> AdvantagesReport:
        arguments = []
        for rank, own_values in enumerate(self._by_rank(plan, values)):
            received = plan.received_by(rank // self.sequence_parallel)
            own = None if by_sequence is None else {i: by_sequence[i] for i in received}
            arguments.append((own, *own_values))
        columns = await self._columns([h.set_advantages for h in self.handles], arguments, "advantages")
        return AdvantagesReport(
            mean_advantages={i: value for _, (means, _) in columns for i, value in means.items()},
            metrics=merge_metrics(metrics for _, (_, metrics) in columns),
            returns=tuple(_by_sequence(plan, columns)),
        )

    async def forward_backward(
        self,
        minibatch: int,
        inputs: StatesByRank | GivenByRank = (),
        *,
        ends: bool = True,
        loss: OwnLoss | None = None,
    ) -> Metrics:
        options: dict[str, Any] = {} if ends else {"ends": False}  # ranks with another kind of loss take no option
        options |= {} if loss is None else {"loss": loss}
        return await self._step([h.forward_backward for h in self.handles], inputs, self.updating, minibatch, **options)

    async def token_signals(self, sequences: Sequence[int]) -> list[Ref[TokenSignals]]:
        arguments = [(tuple(sequences),)] * len(self.handles)
        columns = await self._columns([h.token_signals for h in self.handles], arguments, "samples")
        return [column for column, size in columns if size]

    async def empty_cache(self) -> None:
        await self.all([h.empty_cache.remote() for h in self.handles], "weight sync")

    async def publish(self, version: int) -> WeightManifest:
        manifests: list[WeightManifest] = await self.each(lambda h: h.publish.remote(version), "weight sync")
        return manifests[0]

    async def send(self, manifest: WeightManifest) -> None:
        await self.all([h.send.remote(manifest) for h in self.handles], "weight sync")

    async def settle(self) -> None:
        await self.all([h.settle.remote() for h in self.handles], "weight sync")


class CriticGang(Gang):
    """The ranks of an online run's critic."""

    role: Role = "critic"
    updating = "critic update"

    async def values(self, plan: BatchPlan, groups: Sequence[CompletedGroup]) -> list[RemoteColumns[TokenValues]]:
        shares = self._shares(plan, [group.columns for group in groups])
        return _by_sequence(plan, await self._columns([h.values for h in self.handles], shares, "values"))

    async def prepare(self, plan: BatchPlan, returns: Sequence[RemoteColumns[TokenValues]]) -> None:
        columns = zip(self.handles, self._by_rank(plan, returns), strict=True)
        await self.all([handle.prepare.remote(*own) for handle, own in columns], "advantages")

    async def forward_backward(self, minibatch: int) -> Metrics:
        return await self._step([h.forward_backward for h in self.handles], (), self.updating, minibatch)


class OfflineGang(Gang):
    """The ranks of a model trained on fixed data."""

    role: Role = "policy"
    sets: Sequence[Ref[Examples | Pairs]] = ()
    references: Mapping[int, Path] = {}  # the files of the reference columns, by data set

    async def restart(self) -> None:
        await super().restart()
        if self.sets:
            await self.load_data(self.sets)
        for dataset, path in self.references.items():
            if not await self.read_reference(dataset, path):
                raise RunError(f"reference: the new policy ranks cannot read {path}. {RESUMES}")

    async def load_data(self, sets: Sequence[Ref[Examples | Pairs]]) -> None:
        self.sets = sets
        await self.all([h.load_data.remote(*sets) for h in self.handles], "data")

    async def load_train_set(self, rows: Ref[Examples | Pairs]) -> None:
        self.sets = [rows, *self.sets[1:]]
        self.references = {dataset: path for dataset, path in self.references.items() if dataset}
        await self.all([h.load_train_set.remote(rows) for h in self.handles], "data")

    async def update_on(
        self, plan: MinibatchPlan, states: StatesByRank = (), *, snapshot: int | None = None
    ) -> Metrics:
        return await self._step([h.update_on for h in self.handles], states, "update", plan, snapshot=snapshot)

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        return await self._step([h.evaluate for h in self.handles], states, "eval", dataset, name, plan)

    async def reference_key(self, dataset: int) -> str:
        """Return the first rank's key of the weights. All ranks take part in gathering the weights."""
        keys: list[str] = await self.all([h.reference_key.remote(dataset) for h in self.handles], "reference")
        return keys[0]

    async def reference_logprobs(self, dataset: int, plan: MinibatchPlan) -> list[Ref[TokenValues]]:
        arguments = [(dataset, plan)] * len(self.handles)
        columns = await self._columns([h.reference_logprobs for h in self.handles], arguments, "reference")
        return [column for column, _ in columns]

    async def store_reference(self, dataset: int, path: Path, columns: Sequence[Ref[TokenValues]]) -> None:
        """Give every rank all reference columns, since each step deals the data set's rows to the ranks again."""
        await self.all([h.store_reference.remote(dataset, path, *columns) for h in self.handles], "reference")
        self.references = {**self.references, dataset: path}

    async def read_reference(self, dataset: int, path: Path, *, compare: bool = True) -> bool:
        is_read = all(await self.each(lambda h: h.read_reference.remote(dataset, path, compare=compare), "reference"))
        if is_read:
            self.references = {**self.references, dataset: path}
        return is_read
