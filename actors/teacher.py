"""The teacher's workers: independent processes among which the rows of a step are dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle

from actors.calls import wait_all
from actors.gang import largest, rank_places, spawn
from actors.placement import Placement
from actors.processes import Processes
from rlhf.config.root import Config
from rlhf.data.packing import balance
from rlhf.roles import MemoryReport, Ref, StatesByRank
from rlhf.types import Examples, LearntStates, MinibatchPlan, VocabularyHead
from rlhf.workers.teacher import TeacherWorker


def spawn_teacher(config: Config, placement: Placement) -> TeacherWorkers:
    """The workers of a run's teacher."""
    options = {"max_tokens_per_microbatch": config.train.max_tokens_per_microbatch}
    places = rank_places(config, placement, "teacher", threads=config.cluster.roles.teacher.threads)
    handles = spawn(placement, "teacher", places, lambda place: ((config.teacher, place), options), TeacherWorker)
    return TeacherWorkers(handles, deadline_s=config.cluster.call_timeout_s)


class TeacherWorkers:
    """The teacher role."""

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, deadline_s: float) -> None:
        self.handles = handles
        self.deadline_s = deadline_s
        self.processes = Processes("teacher", handles)
        self.lengths: Sequence[Sequence[int]] = ()

    async def start(self, *, deadline_s: float) -> None:
        """Load the models."""
        await self.processes.found(deadline_s=deadline_s)
        refs = [h.start.remote() for h in self.handles]
        await wait_all(refs, role="teacher", stage="start", deadline_s=deadline_s)

    async def load_data(self, sets: Sequence[Ref[Examples]], *, lengths: Sequence[Sequence[int]]) -> None:
        """Each worker maps the data sets. `lengths`: tokens of each row of each set."""
        self.lengths = lengths
        refs = [h.load_data.remote(*sets) for h in self.handles]
        await wait_all(refs, role="teacher", stage="data", deadline_s=self.deadline_s)

    async def head(self) -> Ref[VocabularyHead]:
        """The first worker's."""
        head, done = self.handles[0].head.options(num_returns=2).remote()
        await wait_all([done], role="teacher", stage="start", deadline_s=self.deadline_s)
        found: Ref[VocabularyHead] = head
        return found

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Rows are dealt out by equal work; each worker packs its own together and returns a column for each rank."""
        rows = [(row, rank) for rank, share in enumerate(plan.sequences_by_rank) for row in share]
        num_ranks = len(plan.sequences_by_rank)
        work = balance([self.lengths[dataset][row] for row, _ in rows], min(len(self.handles), len(rows)))
        by_rank: list[list[Ref[LearntStates]]] = [[] for _ in range(num_ranks)]
        waits = []
        for handle, chosen in zip(self.handles, work, strict=False):
            shares = [[rows[i][0] for i in chosen if rows[i][1] == rank] for rank in range(num_ranks)]
            *columns, done = handle.states.options(num_returns=num_ranks + 1).remote(dataset, shares)
            for mine, column in zip(by_rank, columns, strict=True):
                mine.append(column)
            waits.append(done)
        await wait_all(waits, role="teacher", stage="teacher", deadline_s=self.deadline_s)
        return by_rank

    async def memory(self) -> MemoryReport:
        """Peaks over the workers."""
        refs = [h.memory.remote() for h in self.handles]
        return largest(await wait_all(refs, role="teacher", stage="memory", deadline_s=self.deadline_s))

    async def stop(self) -> None:
        """End the workers: they hold nothing to be given back."""
        self.end()

    def end(self) -> None:
        """End the workers at once."""
        self.processes.end()
