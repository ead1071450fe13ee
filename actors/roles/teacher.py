"""Run the teachers' workers: independent processes that share the sequences of a step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle

from actors.roles.group import ModelGroup, WorkerPool, all_results
from actors.roles.worker_pools import ReferenceWorkers
from rlhf.data.packing import balance
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, Ref, RemoteColumns, StatesByRank, teacher_prompts
from rlhf.types import ONLY_TEACHER, Examples, MinibatchPlan, TeacherColumn, TokenValues, VocabularyHead


class _Teacher(ModelGroup, WorkerPool):
    """Workers that give the student's ranks the teachers' predictions and vocabulary heads."""

    role: Role = "teacher"
    present: str | None = None  # the teacher of the last request, which is on the devices; None: no request yet

    async def head(self, teacher: str) -> Ref[VocabularyHead]:
        self.present = teacher
        columns = await self.columns(
            0, lambda h: h.head.options(num_returns=2).remote(teacher=teacher), "start", work=("head", teacher)
        )
        head: Ref[VocabularyHead] = columns[0]
        return head

    async def states_by_rank(
        self,
        plan: MinibatchPlan,
        length_of: Callable[[int], int],
        request: Callable[[Callable[..., Any], Sequence[Sequence[int]]], Any],
    ) -> StatesByRank:
        """Return columns for each rank, with each row of the rank once. The teachers take turns. The teacher on the
        device is the first.

        A teacher's rows are distributed by equal work. `request` calls a method of a worker with the worker's rows for
        each rank.
        """
        rows = [(row, rank) for rank, share in enumerate(plan.sequences_by_rank) for row in dict.fromkeys(share)]
        of_teachers: dict[str, list[tuple[int, int]]] = {}
        for row, rank in rows:
            of_teachers.setdefault(plan.teacher_of(row), []).append((row, rank))
        num_ranks = len(plan.sequences_by_rank)
        names = sorted(of_teachers, key=lambda name: (name != self.present, name))
        self.present = names[-1] if names else self.present
        columns = await all_results(
            [self._states(of_teachers[name], name, num_ranks, length_of, request) for name in names]
        )
        return [[column for of_teacher in columns for column in of_teacher[rank]] for rank in range(num_ranks)]

    async def _states(
        self,
        rows: Sequence[tuple[int, int]],
        teacher: str,
        num_ranks: int,
        length_of: Callable[[int], int],
        request: Callable[[Callable[..., Any], Sequence[Sequence[int]]], Any],
    ) -> StatesByRank:
        """Return a teacher's columns of some rows, each given with the row's rank."""
        by_worker = balance([length_of(row) for row, _ in rows], min(len(self.handles), len(rows)))

        def compute(worker: int, chosen: Sequence[int]) -> Awaitable[Sequence[Ref[TeacherColumn]]]:
            shares = [[rows[i][0] for i in chosen if rows[i][1] == rank] for rank in range(num_ranks)]
            return self.columns(
                worker,
                lambda h: request(partial(h.states.options(num_returns=num_ranks + 1).remote, teacher=teacher), shares),
                self.role,
                work=(teacher, *map(tuple, shares)),
            )

        columns = await all_results([compute(worker, chosen) for worker, chosen in enumerate(by_worker)])
        return [[of_worker[rank] for of_worker in columns] for rank in range(num_ranks)]


class TeacherWorkers(_Teacher):
    """The teacher role of a run on fixed data, with all teachers."""

    sets: Sequence[Ref[Examples]] = ()
    translations: Sequence[Ref[Examples]] = ()
    lengths: Sequence[Sequence[int]] = ()  # tokens of each row of each data set

    async def load_data(
        self,
        sets: Sequence[Ref[Examples]],
        *,
        lengths: Sequence[Sequence[int]],
        translations: Sequence[Ref[Examples]] = (),
    ) -> None:
        """Map the data sets into each worker's memory. `lengths` holds the tokens of each row of each set.

        `translations` are the sets in the tokens of each row's teacher, for teachers with another tokenizer.
        """
        self.sets, self.lengths, self.translations = sets, lengths, translations
        await self.each(lambda h: h.load_data.remote(*sets), "data")
        if translations:
            await self.each(lambda h: h.load_translations.remote(*translations), "data")

    def _start_calls(self, handle: ActorHandle[Any]) -> list[ObjectRef[Any]]:
        translated = [handle.load_translations.remote(*self.translations)] if self.translations else []
        return [*super()._start_calls(handle), handle.load_data.remote(*self.sets), *translated]

    async def states(self, dataset: int, plan: MinibatchPlan) -> StatesByRank:
        """Return columns for each rank. Each worker packs its rows of a teacher together."""
        lengths = self.lengths[dataset]
        return await self.states_by_rank(plan, lengths.__getitem__, lambda states, shares: states(dataset, shares))


class OnlineTeacherWorkers(_Teacher, ReferenceWorkers):
    """The teacher role of a student trained on the student's responses."""

    async def states(self, plan: MinibatchPlan, groups: Sequence[CompletedGroup]) -> StatesByRank:
        lengths = {info.sequence_id: info.num_tokens for group in groups for info in group.infos}
        group_of = {info.sequence_id: place for place, group in enumerate(groups) for info in group.infos}

        def request(states: Callable[..., Any], shares: Sequence[Sequence[int]]) -> Any:
            wanted = [groups[place] for place in sorted({group_of[i] for share in shares for i in share})]
            return states(shares, *(group.rollouts for group in wanted), prompts=teacher_prompts(wanted))

        return await self.states_by_rank(plan, lengths.__getitem__, request)

    async def logprobs(
        self,
        groups: Sequence[CompletedGroup],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
        teacher: str = ONLY_TEACHER,
    ) -> list[RemoteColumns[TokenValues]]:
        self.present = teacher
        return await self.columns_of_groups(groups, only, temperatures or {}, teacher=teacher)

    async def mean_logprobs(
        self, groups: Sequence[CompletedGroup], *, temperature: float, samples_per_prompt: int, teacher: str
    ) -> Mapping[int, float]:
        """Return the means by sequence id. The workers share the groups evenly."""
        self.present = teacher
        shares = balance([1] * len(groups), min(len(self.handles), len(groups)))

        def compute(worker: int, share: Sequence[int]) -> Awaitable[Mapping[int, float]]:
            given, prompts = [groups[i].rollouts for i in share], teacher_prompts([groups[i] for i in share])
            return self.ask(
                worker,
                lambda h: h.mean_logprobs.remote(
                    temperature, samples_per_prompt, *given, teacher=teacher, prompts=prompts
                ),
                self.role,
                work=("mean_logprobs", teacher, tuple(share)),
            )

        results = await all_results([compute(worker, share) for worker, share in enumerate(shares)])
        return {sequence_id: mean for means in results for sequence_id, mean in means.items()}
