"""Run the teacher's workers: independent processes that share the sequences of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.roles.group import ModelGroup
from actors.roles.worker_pools import ReferenceWorkers
from rlhf.data.packing import balance
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, Ref, StatesByRank
from rlhf.types import Examples, LearntStates, MinibatchPlan, Rollouts, VocabularyHead


class _Teacher(ModelGroup):
    """Workers that give the student's ranks hidden states and the vocabulary head."""

    role: Role = "teacher"

    async def head(self) -> Ref[VocabularyHead]:
        """Return the first worker's vocabulary head."""
        head, done = self.handles[0].head.options(num_returns=2).remote()
        await self.all([done], "start")
        vocabulary_head: Ref[VocabularyHead] = head
        return vocabulary_head

    async def states_by_rank(
        self,
        plan: MinibatchPlan,
        length_of: Callable[[int], int],
        request: Callable[[Callable[..., Any], Sequence[Sequence[int]]], Any],
    ) -> StatesByRank:
        """Distribute a plan's rows by equal work, and return a column for each rank.

        `request` calls a worker's method with each rank's rows of this worker.
        """
        rows = [(row, rank) for rank, share in enumerate(plan.sequences_by_rank) for row in share]
        num_ranks = len(plan.sequences_by_rank)
        work = balance([length_of(row) for row, _ in rows], min(len(self.handles), len(rows)))
        by_rank: list[list[Ref[LearntStates]]] = [[] for _ in range(num_ranks)]
        waits = []
        for handle, chosen in zip(self.handles, work, strict=False):
            shares = [[rows[i][0] for i in chosen if rows[i][1] == rank] for rank in range(num_ranks)]
            *columns, done = request(handle.states.options(num_returns=num_ranks + 1).remote, shares)
            for rank_columns, column in zip(by_rank, columns, strict=True):
                rank_columns.append(column)
            waits.append(done)
        await self.all(waits, self.role)
        return by_rank


class TeacherWorkers(_Teacher):
    """The teacher role of a run on fixed data."""

    lengths: Sequence[Sequence[int]] = ()  # tokens of each row of each data set

    async def load_data(self, sets: Sequence[Ref[Examples]], *, lengths: Sequence[Sequence[int]]) -> None:
        """Map the data sets into each worker's memory. `lengths` holds the tokens of each row of each set."""
        self.lengths = lengths
        await self.all([h.load_data.remote(*sets) for h in self.handles], "data")

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Return a column for each rank. Each worker packs its rows together."""
        lengths = self.lengths[dataset]
        return await self.states_by_rank(plan, lengths.__getitem__, lambda states, shares: states(dataset, shares))


class OnlineTeacherWorkers(_Teacher, ReferenceWorkers):
    """The teacher role of a student trained on its own responses."""

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> StatesByRank:
        """Return a column for each rank. Each worker packs its sequences together."""
        lengths = {info.sequence_id: info.num_tokens for group in groups for info in group.infos}
        group_of = {info.sequence_id: place for place, group in enumerate(groups) for info in group.infos}

        def request(states: Callable[..., Any], shares: Sequence[Sequence[int]]) -> Any:
            wanted = sorted({group_of[i] for share in shares for i in share})
            return states(shares, *(groups[place].rollouts for place in wanted))

        return await self.states_by_rank(plan, lengths.__getitem__, request)

    async def mean_logprobs(
        self, rollouts: Sequence[Ref[Rollouts]], *, temperature: float, samples_per_prompt: int
    ) -> Mapping[int, float]:
        """Return the means by sequence id. The workers share the batches evenly."""
        shares = balance([1] * len(rollouts), min(len(self.handles), len(rollouts)))
        refs = [
            handle.mean_logprobs.remote(temperature, samples_per_prompt, *[rollouts[i] for i in share])
            for handle, share in zip(self.handles, shares, strict=False)
        ]
        results: list[Mapping[int, float]] = await self.all(refs, self.role)
        return {sequence_id: mean for means in results for sequence_id, mean in means.items()}
