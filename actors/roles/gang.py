"""Manage gangs of trained ranks. A failure or missed deadline of one rank ends the whole gang, without retries."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.cluster.processes import KEEPS_MEMORY, Processes, hub_environment
from actors.cluster.waiting import wait_all
from actors.weights import Meeting, Transport, WeightManifest
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.errors import RunError, UserError
from rlhf.roles import AdvantagesReport, Arithmetic, Metrics, PrepareReport, Ref, StatesByRank
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.types import (
    BatchPlan,
    Examples,
    MemoryReport,
    MinibatchPlan,
    Pairs,
    Role,
    Rollouts,
    TokenSignals,
    TokenValues,
    VocabularyHead,
)
from rlhf.workers.rank_context import RankContext

T = TypeVar("T")

logger = logging.getLogger(__name__)
END_WITHIN_S = 10.0


class Stoppable(Protocol):
    """A group of actors with an orderly and an immediate end."""

    async def stop(self) -> None: ...

    def end(self) -> None: ...


class Placed(Protocol):
    """An object that holds cluster resources."""

    def release(self) -> None:
        """Release the resources to the cluster."""


@asynccontextmanager
async def ending(groups: Sequence[Stoppable], placement: Placed) -> AsyncIterator[None]:
    """Stop the groups in order after the block, when its results are on disk. After a failure, end them at once."""
    try:
        yield
        for group in groups:
            try:
                await group.stop()
            except RunError as error:
                logger.warning("%s It is ended instead.", error)
    finally:
        for group in groups:
            group.end()
        placement.release()


class Gang:
    """Ranks 0 to n - 1 of one role, with the methods common to all trained roles."""

    def __init__(
        self, role: Role, handles: Sequence[ActorHandle[Any]], *, deadline_s: float, sequence_parallel: int = 1
    ) -> None:
        self.role = role
        self.sequence_parallel = sequence_parallel
        self.handles = handles
        self.deadline_s = deadline_s
        self.processes = Processes(role, handles)

    @property
    def num_ranks(self) -> int:
        """Return the number of data-parallel ranks."""
        return len(self.handles) // self.sequence_parallel

    def distinct(self, results: Sequence[T]) -> Sequence[T]:
        """Return one result per data-parallel rank. Ranks that share micro-batches return equal results."""
        return results[:: self.sequence_parallel]

    async def all(self, refs: Sequence[ObjectRef[Any]], stage: str, *, deadline_s: float | None = None) -> list[Any]:
        """Return every rank's result, in rank order. A failure ends the gang."""
        try:
            return await wait_all(refs, role=self.role, stage=stage, deadline_s=deadline_s or self.deadline_s)
        except (RunError, UserError):
            self.end()
            raise

    def end(self) -> None:
        """End all ranks at once."""
        self.processes.end()

    async def start(self, *, one_host: bool, deadline_s: float) -> None:
        """Connect the ranks and load the model. Sets `fingerprint` from the model's architecture."""
        await self.processes.wait_until_started(deadline_s=deadline_s)
        [(host, port)] = await self.all([self.handles[0].address.remote(one_host)], "start", deadline_s=deadline_s)
        starts = [h.start.remote(host, port) for h in self.handles]
        self.fingerprint: str = (await self.all(starts, "start", deadline_s=deadline_s))[0]

    async def take_teacher(self, head: Ref[VocabularyHead]) -> None:
        """Give each rank the teacher's vocabulary head."""
        await self.all([h.take_teacher.remote(head) for h in self.handles], "start")

    def states_by_rank(self, states: StatesByRank) -> StatesByRank:
        """Return the states of each rank's rows, in rank order."""
        return [states[rank // self.sequence_parallel] if states else () for rank in range(len(self.handles))]

    async def save(self, folder: Path) -> None:
        """Save the checkpoint shard of every rank."""
        await self.all([h.save.remote(folder) for h in self.handles], "checkpoint")

    async def load(self, folder: Path) -> None:
        """Load the checkpoint shard of every rank."""
        await self.all([h.load.remote(folder) for h in self.handles], "resume")

    async def export(self, folder: Path, *, merged: bool = False) -> None:
        """Write a Hugging Face folder or an adapter folder. `merged` adds the adapter to the weights."""
        await self.all([h.export.remote(folder, merged) for h in self.handles], "export")

    async def arithmetic(self) -> Arithmetic:
        """Return the total peak of the ranks. They are measured concurrently, since they may share a machine."""
        reports: list[Arithmetic] = await self.all([h.arithmetic.remote() for h in self.handles], "start")
        return replace(reports[0], peak_flops=sum(report.peak_flops for report in reports))

    async def offload(self) -> None:
        """Free the GPUs for the engines."""
        await self.all([h.offload.remote() for h in self.handles], "offload")

    async def reload(self) -> None:
        """Move the state back to the GPUs."""
        await self.all([h.reload.remote() for h in self.handles], "reload")

    async def memory(self) -> MemoryReport:
        """Return the memory peaks over the ranks."""
        return largest(await self.all([h.memory.remote() for h in self.handles], "memory"))

    async def stop(self) -> None:
        """Let the ranks leave in order."""
        if not self.processes.ended:
            await self.all([h.stop.remote() for h in self.handles], "stop", deadline_s=END_WITHIN_S)
            self.end()


class PolicyGang(Gang):
    """The ranks of an online run's policy."""

    async def meeting(self, *, num_receivers: int, one_host: bool, timeout_s: float) -> Meeting:
        """Return the address at which rank 0 waits for the receivers of a broadcast."""
        [(host, port)] = await self.all([self.handles[0].address.remote(one_host)], "weight sync")
        return Meeting(address=host, port=port, num_receivers=num_receivers, timeout_s=timeout_s)

    async def open_weights(
        self, transport: Transport, meeting: Meeting | None, adapters: Path, *, num_engines: int
    ) -> None:
        """Open the ranks' ends of the weight transport. A broadcast blocks here until all receivers have connected."""
        refs = [h.open_weights.remote(transport, meeting, adapters, num_engines) for h in self.handles]
        await self.all(refs, "weight sync")

    async def prepare(
        self, plan: BatchPlan, rollouts: Sequence[Ref[Rollouts]], ref_logprobs: Sequence[Ref[TokenValues]]
    ) -> PrepareReport:
        """Give each rank its share of the batch."""
        refs = [h.prepare.remote(plan, len(rollouts), *rollouts, *ref_logprobs) for h in self.handles]
        reports = self.distinct(await self.all(refs, "experience"))
        return PrepareReport(
            sequences=tuple(s for sequences, _ in reports for s in sequences),
            metrics=merge_metrics(metrics for _, metrics in reports),
        )

    async def set_advantages(
        self, by_sequence: Mapping[int, float] | None, values: Sequence[Ref[TokenValues]]
    ) -> AdvantagesReport:
        """Set the advantages of each rank's tokens. The returns stay references."""
        pairs = [h.set_advantages.options(num_returns=2).remote(by_sequence, *values) for h in self.handles]
        reports = self.distinct(await self.all([scalars for _, scalars in pairs], "advantages"))
        return AdvantagesReport(
            mean_advantages={i: value for means, _ in reports for i, value in means.items()},
            metrics=merge_metrics(metrics for _, metrics in reports),
            returns=tuple(returns for returns, _ in self.distinct(pairs)),
        )

    async def update(self, minibatch: int, states: StatesByRank = ()) -> Metrics:
        """Make one optimizer step on a minibatch."""
        refs = [
            h.update.remote(minibatch, *rank_states)
            for h, rank_states in zip(self.handles, self.states_by_rank(states), strict=True)
        ]
        return merge_metrics(self.distinct(await self.all(refs, "update")))

    async def token_signals(self, sequences: Sequence[int]) -> list[Ref[TokenSignals]]:
        """Return one column per rank, for its share of the sequences."""
        refs = [h.token_signals.options(num_returns=2).remote(tuple(sequences)) for h in self.handles]
        await self.all([size for _, size in refs], "samples")
        return [column for column, _ in self.distinct(refs)]

    async def empty_cache(self) -> None:
        """Return unused memory of torch's allocator to the GPUs."""
        await self.all([h.empty_cache.remote() for h in self.handles], "weight sync")

    async def publish(self, version: int) -> WeightManifest:
        """Stage the weights and return the manifest of rank 0."""
        manifests = await self.all([h.publish.remote(version) for h in self.handles], "weight sync")
        manifest: WeightManifest = manifests[0]
        return manifest

    async def send(self, manifest: WeightManifest) -> None:
        """Send the weights while the engines receive."""
        await self.all([h.send.remote(manifest) for h in self.handles], "weight sync")

    async def settle(self) -> None:
        """Free the memory of the transfer."""
        await self.all([h.settle.remote() for h in self.handles], "weight sync")

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Compute the probe on all ranks, since the weights may be sharded over them."""
        results = await self.all([h.probe.remote(tuple(token_ids)) for h in self.handles], "weight sync")
        logprobs: list[float] = results[0]
        return logprobs


class CriticGang(Gang):
    """The ranks of an online run's critic."""

    async def values(self, plan: BatchPlan, rollouts: Sequence[Ref[Rollouts]]) -> list[Ref[TokenValues]]:
        """Return one column of values per rank."""
        refs = [h.values.options(num_returns=2).remote(plan, *rollouts) for h in self.handles]
        await self.all([done for _, done in refs], "values")
        return [column for column, _ in self.distinct(refs)]

    async def prepare(self, plan: BatchPlan, returns: Sequence[Ref[TokenValues]]) -> None:
        """Give each rank the targets of its share."""
        await self.all([h.prepare.remote(*returns) for h in self.handles], "advantages")

    async def update(self, minibatch: int) -> Metrics:
        """Make one optimizer step on a minibatch."""
        results = await self.all([h.update.remote(minibatch) for h in self.handles], "critic update")
        return merge_metrics(self.distinct(results))


class OfflineGang(Gang):
    """The ranks of a model trained on fixed data."""

    async def load_data(self, sets: Sequence[Ref[Examples | Pairs]]) -> None:
        """Map the data sets into each rank's memory."""
        await self.all([h.load_data.remote(*sets) for h in self.handles], "data")

    async def update_on(self, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        """Make one optimizer step on rows of the training set."""
        refs = [
            h.update_on.remote(plan, *rank_states)
            for h, rank_states in zip(self.handles, self.states_by_rank(states), strict=True)
        ]
        return merge_metrics(self.distinct(await self.all(refs, "update")))

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: StatesByRank = ()) -> Metrics:
        """Return loss and accuracy on rows of a data set."""
        refs = [
            h.evaluate.remote(dataset, name, plan, *rank_states)
            for h, rank_states in zip(self.handles, self.states_by_rank(states), strict=True)
        ]
        return merge_metrics(self.distinct(await self.all(refs, "eval")))

    async def reference_key(self, dataset: int) -> str:
        """Return the first rank's key of the weights. All ranks take part, since they gather the weights."""
        keys: list[str] = await self.all([h.reference_key.remote(dataset) for h in self.handles], "reference")
        return keys[0]

    async def reference_logprobs(self, dataset: int, plan: MinibatchPlan) -> list[Ref[TokenValues]]:
        """Return one column per data-parallel rank."""
        refs = [h.reference_logprobs.options(num_returns=2).remote(dataset, plan) for h in self.handles]
        await self.all([done for _, done in refs], "reference")
        return [column for column, _ in self.distinct(refs)]

    async def keep_reference(self, dataset: int, path: Path, columns: Sequence[Ref[TokenValues]]) -> None:
        """Give every rank all reference columns."""
        await self.all([h.keep_reference.remote(dataset, path, *columns) for h in self.handles], "reference")

    async def read_reference(self, dataset: int, path: Path) -> bool:
        """Return whether every rank could read the stored reference columns."""
        return all(await self.all([h.read_reference.remote(dataset, path) for h in self.handles], "reference"))


def largest(reports: Sequence[MemoryReport]) -> MemoryReport:
    """Return the peaks of the largest process."""
    gpus = [report.gpu_gib for report in reports if report.gpu_gib is not None]
    return MemoryReport(rss_gib=max(report.rss_gib for report in reports), gpu_gib=max(gpus) if gpus else None)


def _places(cluster: ClusterConfig, placement: Placement, role: Role) -> list[RankContext]:
    """Return the context of each rank of a role. On a GPU, a process sees only its assigned device."""
    nodes, threads = placement.nodes_of(role), getattr(cluster.roles, role).threads
    cuda = cluster.device == "cuda" and placement.seating.seats[role][0].gpus > 0.0
    places = []
    for rank, node in enumerate(nodes):
        on_node = nodes.count(node)
        auto = max(1, placement.cores(node) // on_node)
        places.append(
            RankContext(
                rank=rank,
                world_size=len(nodes),
                local_rank=0 if cuda else nodes[:rank].count(node),
                local_world_size=1 if cuda else on_node,
                device="cuda" if cuda else "cpu",
                threads=auto if threads == "auto" else threads,
                deadline_s=cluster.call_timeout_s,
            )
        )
    return places


def worker_environment(place: RankContext) -> dict[str, str]:
    """Return the environment of a worker that computes with torch. It must be set before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(place.threads),
        "DS_ACCELERATOR": place.device,
        "TOKENIZERS_PARALLELISM": "false",
        **(KEEPS_MEMORY if place.device == "cpu" else {}),
        **hub_environment(),
    }


def spawn(
    cluster: ClusterConfig,
    placement: Placement,
    role: Role,
    arguments: Callable[[RankContext], tuple[tuple[Any, ...], dict[str, Any]]],
    cls: Any,
    *,
    concurrency: int = 1,
) -> list[ActorHandle[Any]]:
    """Create an actor for each rank of a role. `arguments` returns the constructor arguments for a rank's context."""
    remote = ray.remote(cls)
    handles = []
    for place in _places(cluster, placement, role):
        args, options = arguments(place)
        environment = worker_environment(place)
        settings = placement.options(role, place.rank, environment, concurrency=concurrency)
        handles.append(remote.options(**settings).remote(*args, **options))
    return handles
