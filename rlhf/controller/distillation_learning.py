"""Learn from a teacher's prediction at every token sampled by the student, or given with the prompts.

batch plan -> teacher's logprobs -> minibatches -> updates (of the sampled tokens alone), or
batch plan -> minibatches -> teacher's states -> updates (over the whole vocabulary)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.on_policy_distillation import OnPolicyDistillation
from rlhf.config.derive import has_named_teachers, is_served, responses_per_step, teacher_of
from rlhf.config.schema.root import Config
from rlhf.controller.batches import plan_batch, with_given
from rlhf.controller.evaluation import in_turn, mean_logprobs
from rlhf.controller.learning import Columns, Learning, OnlineRoles, Signals
from rlhf.controller.record import RunRecord
from rlhf.roles import CompletedGroup, ScoredGroup, StatesByRank
from rlhf.rollouts.records.given import given_sequence
from rlhf.types import BatchPlan


class DistillationLearning(Learning):
    """Trains on all responses. Rewards, if there are any, are only measured or are added to the teacher's
    advantages."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        assert roles.teacher is not None
        self.teacher = roles.teacher
        self.algorithm = algorithm_of(config.algorithm, OnPolicyDistillation)
        self.reads_states = config.algorithm.reads_teacher_states
        self.is_ahead = config.cluster.roles.teacher.colocate_with is None

    def arrived(self, scored: ScoredGroup) -> None:
        """Begin the teacher's log-probabilities of the group if the teacher has separate hardware.

        The groups of all other teachers wait for the step, so teachers take turns once a step.
        """
        if not self.is_ahead or self.reads_states:
            return
        if is_served(self.config) or self.teacher.present in (None, self._teacher_of(scored.group)):
            self.columns.begin(scored, self._logprobs([scored]))

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        record, policy = self.record, self.roles.policy
        groups = self.scores.normalized(groups)
        answered = [scored.group for scored in groups]
        given: list[CompletedGroup] = []
        if self.algorithm.config.reads_given_responses:
            given = [_given(group) for group in answered]
        plan = self._plan(groups, given, step)
        with record.stage(self.teacher.role):
            teacher_columns, means = await self._teachers_values(groups)
        with record.stage("experience"):
            record.add((await policy.prepare(plan, [*answered, *given], teacher_columns)).metrics)
        order = self.visits(len(plan.minibatches), step)
        if self.reads_states:
            await self._update_all(order, plan, [*answered, *given])
        else:
            for minibatch in order:
                await self._update(minibatch)
        trained = frozenset(info.sequence_id for scored in groups for info in scored.group.infos)
        return Signals(trained=trained, teacher_logprobs=means)

    def _plan(self, groups: Sequence[ScoredGroup], given: Sequence[CompletedGroup], step: int) -> BatchPlan:
        """Return the step's minibatches. Their scores are the terms added to the advantages of a response's tokens."""
        seed = self.config.run.seed
        plan = plan_batch(
            groups,
            step=step,
            seed=seed,
            num_minibatches=responses_per_step(self.rollouts) // self.config.train.sequences_per_update,
            num_ranks=self.roles.policy.num_ranks,
            kl_coef=0.0,
        )
        if given:
            share = 1.0 - self.algorithm.config.on_policy_share
            plan = with_given(plan, [info for group in given for info in group.infos], share=share, seed=seed)
        if has_named_teachers(self.config):
            every = [*(scored.group for scored in groups), *given]
            owners = {info.sequence_id: self._teacher_of(group) for group in every for info in group.infos}
            plan = replace(plan, minibatches=tuple(replace(one, teachers=owners) for one in plan.minibatches))
        if not self.algorithm.config.reward_coef:
            return replace(plan, scores={})
        ids = sorted(plan.scores)
        added = self.algorithm.reward_advantages(
            torch.tensor([plan.scores[i] for i in ids], dtype=torch.float64),
            group_size=self.rollouts.samples_per_prompt,
        )
        return replace(plan, scores=dict(zip(ids, added.tolist(), strict=True)))

    def _teacher_of(self, group: CompletedGroup) -> str:
        return teacher_of(self.config, group.request.prompt.columns)

    async def _teachers_values(self, groups: Sequence[ScoredGroup]) -> tuple[Columns, dict[int, float]]:
        """Return the columns of log-probabilities, if used, and the means of the samples to write, by sequence id.

        Each teacher has one turn.
        """
        config, columns, means = self.config, Columns(), dict[int, float]()
        num_shown = -(-config.tracking.samples_per_step // self.rollouts.samples_per_prompt)
        draws: Any = self.rollouts.model_dump(include={"temperature", "samples_per_prompt"})
        for name in in_turn(config, self.teacher):
            if not self.reads_states:
                of_teacher = [scored for scored in groups if self._teacher_of(scored.group) == name]
                columns += await self.columns.take(of_teacher, self._logprobs)
            shown = [one.group for one in groups[:num_shown] if self._teacher_of(one.group) == name]
            means |= await mean_logprobs(shown, config, self.teacher, **draws)
        return columns, means

    async def _logprobs(self, groups: Sequence[ScoredGroup]) -> Columns:
        """Return a column of log-probabilities for each group. All groups have the same teacher."""
        name = self._teacher_of(groups[0].group)
        return await self.teacher.logprobs([scored.group for scored in groups], temperatures={}, teacher=name)

    async def _update(self, minibatch: int, states: StatesByRank = ()) -> None:
        with self.record.stage("update"):
            self.record.add(await self.roles.policy.forward_backward(minibatch, states))
            self.record.add(await self.roles.policy.optim_step())

    async def _update_all(self, order: Sequence[int], plan: BatchPlan, answered: Sequence[CompletedGroup]) -> None:
        """Update from the teacher's states, requested for one minibatch at a time because of the size. A teacher with
        separate hardware computes the next minibatch during an update."""

        async def states_of(minibatch: int) -> StatesByRank:
            with self.record.stage(self.teacher.role):
                return await self.teacher.states(plan.minibatches[minibatch], answered)

        states = await states_of(order[0])
        for minibatch, following in zip(order, [*order[1:], None], strict=True):
            if self.is_ahead and following is not None:
                _, states = await asyncio.gather(self._update(minibatch, states), states_of(following))
            else:
                await self._update(minibatch, states)
                states = () if following is None else await states_of(following)


def _given(group: CompletedGroup) -> CompletedGroup:
    """Return the given response of a group's prompt. The response goes to each rank by value, because it has few
    tokens."""
    rollouts, info = given_sequence(group.request)
    return CompletedGroup(request=group.request, rollouts=rollouts, infos=(info,))
