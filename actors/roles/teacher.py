"""Run the teacher's workers: independent processes that share the sequences of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.cluster.processes import Processes
from actors.cluster.waiting import wait_all
from actors.roles.gang import largest, spawn
from actors.roles.worker_pools import ReferenceWorkers
from rlhf.config.schema.root import Config
from rlhf.data.packing import balance
from rlhf.roles import CompletedGroup, Ref, StatesByRank
from rlhf.types import Examples, LearntStates, MemoryReport, MinibatchPlan, Role, Rollouts, VocabularyHead
from rlhf.workers.frozen.online_teacher import OnlineTeacherWorker
from rlhf.workers.frozen.teacher import TeacherWorker


def spawn_teacher(config: Config, placement: Placement) -> TeacherWorkers:
    """Create the teacher workers of a run on fixed data."""
    options = {"max_tokens_per_microbatch": config.train.max_tokens_per_microbatch}
    handles = spawn(
        config.cluster, placement, "teacher", lambda place: ((config.teacher, place), options), TeacherWorker
    )
    return TeacherWorkers(handles, deadline_s=config.cluster.call_timeout_s)


def spawn_online_teacher(config: Config, placement: Placement) -> OnlineTeacherWorkers:
    """Create the teacher workers of an online run."""
    rollouts = config.rollouts
    assert rollouts is not None
    options = {
        "temperature": rollouts.temperature,
        "samples_per_prompt": rollouts.samples_per_prompt,
        "max_tokens_per_microbatch": config.train.max_tokens_per_microbatch,
    }
    handles = spawn(
        config.cluster, placement, "teacher", lambda place: ((config.teacher, place), options), OnlineTeacherWorker
    )
    return OnlineTeacherWorkers(handles, deadline_s=config.cluster.call_timeout_s)


class TeacherWorkers:
    """The teacher role of a run on fixed data."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, deadline_s: float) -> None:
        self.handles = handles
        self.deadline_s = deadline_s
        self.processes = Processes("teacher", handles)
        self.lengths: Sequence[Sequence[int]] = ()

    async def start(self, *, deadline_s: float) -> None:
        """Load the model in every worker."""
        await self.processes.wait_until_started(deadline_s=deadline_s)
        refs = [h.start.remote() for h in self.handles]
        await wait_all(refs, role="teacher", stage="start", deadline_s=deadline_s)

    async def load_data(self, sets: Sequence[Ref[Examples]], *, lengths: Sequence[Sequence[int]]) -> None:
        """Map the data sets into each worker's memory. `lengths` holds the tokens of each row of each set."""
        self.lengths = lengths
        refs = [h.load_data.remote(*sets) for h in self.handles]
        await wait_all(refs, role="teacher", stage="data", deadline_s=self.deadline_s)

    async def head(self) -> Ref[VocabularyHead]:
        """Return the first worker's vocabulary head."""
        return await _head(self.handles, deadline_s=self.deadline_s)

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Return a column for each rank. Each worker packs its rows together."""
        lengths = self.lengths[dataset]
        return await _dealt_out(
            self.handles,
            plan,
            lengths.__getitem__,
            lambda ask, shares: ask(dataset, shares),
            deadline_s=self.deadline_s,
        )

    async def memory(self) -> MemoryReport:
        """Return the memory peaks over the workers."""
        refs = [h.memory.remote() for h in self.handles]
        return largest(await wait_all(refs, role="teacher", stage="memory", deadline_s=self.deadline_s))

    async def stop(self) -> None:
        """End the workers. They hold no state worth saving."""
        self.end()

    def end(self) -> None:
        """End the workers at once."""
        self.processes.end()


class OnlineTeacherWorkers(ReferenceWorkers):
    """The teacher role of a student trained on its own responses."""

    role: Role = "teacher"

    async def head(self) -> Ref[VocabularyHead]:
        """Return the first worker's vocabulary head."""
        return await _head(self.handles, deadline_s=self.deadline_s)

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> StatesByRank:
        """Return a column for each rank. Each worker packs its sequences together."""
        infos = {info.sequence_id: info for group in groups for info in group.infos}

        def length_of(sequence_id: int) -> int:
            return infos[sequence_id].num_tokens

        def ask(states: Callable[..., Any], shares: Sequence[Sequence[int]]) -> Any:
            wanted = {i for share in shares for i in share}
            given = [group.rollouts for group in groups if any(info.sequence_id in wanted for info in group.infos)]
            return states(shares, *given)

        return await _dealt_out(self.handles, plan, length_of, ask, deadline_s=self.deadline_s)

    async def mean_logprobs(
        self, rollouts: Sequence[Ref[Rollouts]], *, temperature: float, samples_per_prompt: int
    ) -> Mapping[int, float]:
        """Return the means by sequence id. The workers share the batches evenly."""
        shares = balance([1] * len(rollouts), min(len(self.handles), len(rollouts)))
        refs = [
            handle.mean_logprobs.remote(temperature, samples_per_prompt, *[rollouts[i] for i in share])
            for handle, share in zip(self.handles, shares, strict=False)
        ]
        results = await wait_all(refs, role="teacher", stage="teacher", deadline_s=self.deadline_s)
        return {sequence_id: mean for means in results for sequence_id, mean in means.items()}


async def _head(handles: Sequence[ActorHandle[Any]], *, deadline_s: float) -> Ref[VocabularyHead]:
    head, done = handles[0].head.options(num_returns=2).remote()
    await wait_all([done], role="teacher", stage="start", deadline_s=deadline_s)
    vocabulary_head: Ref[VocabularyHead] = head
    return vocabulary_head


async def _dealt_out(
    handles: Sequence[ActorHandle[Any]],
    plan: MinibatchPlan,
    length_of: Callable[[int], int],
    ask: Callable[[Callable[..., Any], Sequence[Sequence[int]]], Any],
    *,
    deadline_s: float,
) -> StatesByRank:
    """Distribute a plan's rows by equal work.

    `ask` calls a worker's method with the share of each rank in the worker's rows.
    """
    rows = [(row, rank) for rank, share in enumerate(plan.sequences_by_rank) for row in share]
    num_ranks = len(plan.sequences_by_rank)
    work = balance([length_of(row) for row, _ in rows], min(len(handles), len(rows)))
    by_rank: list[list[Ref[LearntStates]]] = [[] for _ in range(num_ranks)]
    waits = []
    for handle, chosen in zip(handles, work, strict=False):
        shares = [[rows[i][0] for i in chosen if rows[i][1] == rank] for rank in range(num_ranks)]
        *columns, done = ask(handle.states.options(num_returns=num_ranks + 1).remote, shares)
        for mine, column in zip(by_rank, columns, strict=True):
            mine.append(column)
        waits.append(done)
    await wait_all(waits, role="teacher", stage="teacher", deadline_s=deadline_s)
    return by_rank
