"""Learning from a teacher: it says how it would have gone on at every token that the student sampled.

batch plan -> teacher's log-probabilities -> minibatches -> updates (of the sampled tokens alone), or
batch plan -> minibatches -> teacher's states -> updates (over the whole vocabulary)
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf.algorithms.on_policy_distillation import OnPolicyDistillation, OnPolicyDistillationConfig
from rlhf.config.derive import responses_per_step
from rlhf.config.schema.root import Config
from rlhf.controller.batches import plan_batch, visits
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.record import RunRecord
from rlhf.controller.training_scores import for_training
from rlhf.roles import ScoredGroup, StatesByRank
from rlhf.types import BatchPlan


class DistillationLearning:
    """All responses are learnt from. Rewards, if there are any, are measured, or added to the teacher's advantages."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        assert config.rollouts is not None
        assert isinstance(config.algorithm, OnPolicyDistillationConfig)
        assert roles.teacher is not None
        self.config = config
        self.roles = roles
        self.record = record
        self.rollouts = config.rollouts
        self.teacher = roles.teacher
        self.algorithm = OnPolicyDistillation(config.algorithm)
        self.is_ahead = config.cluster.roles.teacher.colocate_with is None

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """The arrows of the module's docstring."""
        config, record, policy = self.config, self.record, self.roles.policy
        groups = for_training(groups, config.rewards)
        rollouts = [scored.group.rollouts for scored in groups]
        plan = self._plan(groups, step)
        with record.stage("teacher", role="teacher"):
            told = await self.teacher.logprobs(rollouts, temperatures={}) if self.algorithm.config.is_sampled else []
            shown = rollouts[: -(-config.tracking.samples_per_step // self.rollouts.samples_per_prompt)]
            means = await self._mean_logprobs(shown)
        with record.stage("experience", role="policy"):
            record.add((await policy.prepare(plan, rollouts, told)).metrics)
        order = visits(len(plan.minibatches), epochs=config.train.epochs_per_batch, seed=config.run.seed, step=step)
        if self.algorithm.config.is_sampled:
            for minibatch in order:
                await self._update(minibatch)
        else:
            await self._update_all(order, plan, groups)
        trained = frozenset(info.sequence_id for scored in groups for info in scored.group.infos)
        return Signals(trained=trained, teacher_logprobs=means)

    def state(self) -> Mapping[str, Any]:
        """Nothing: the teacher stays what it is."""
        return {}

    async def restore(self, state: Mapping[str, Any], step: int) -> None:
        """There is nothing to take up."""

    def _plan(self, groups: Sequence[ScoredGroup], step: int) -> BatchPlan:
        """The step's minibatches; in place of scores stands what these add to the advantages of a response's tokens."""
        plan = plan_batch(
            groups,
            step=step,
            seed=self.config.run.seed,
            num_minibatches=responses_per_step(self.rollouts) // self.config.train.sequences_per_update,
            num_ranks=self.roles.policy.num_ranks,
            kl_coef=0.0,
        )
        if not self.algorithm.config.reward_coef:
            return replace(plan, scores={})
        ids = sorted(plan.scores)
        added = self.algorithm.reward_advantages(
            torch.tensor([plan.scores[i] for i in ids], dtype=torch.float64),
            group_size=self.rollouts.samples_per_prompt,
        )
        return replace(plan, scores=dict(zip(ids, added.tolist(), strict=True)))

    async def _mean_logprobs(self, rollouts: Sequence[Any]) -> Mapping[int, float]:
        """What the samples file says of responses."""
        if not rollouts:
            return {}
        return await self.teacher.mean_logprobs(
            rollouts, temperature=self.rollouts.temperature, samples_per_prompt=self.rollouts.samples_per_prompt
        )

    async def _update(self, minibatch: int, states: StatesByRank = ()) -> None:
        with self.record.stage("update", role="policy"):
            self.record.add(await self.roles.policy.update(minibatch, states))

    async def _update_all(self, order: Sequence[int], plan: BatchPlan, groups: Sequence[ScoredGroup]) -> None:
        """Updates by states, asked for one minibatch at a time since they are large. A teacher with hardware of its own
        is meanwhile asked for the next one's."""
        answered = [scored.group for scored in groups]

        async def states_of(minibatch: int) -> StatesByRank:
            with self.record.stage("teacher", role="teacher"):
                return await self.teacher.states(plan.minibatches[minibatch], answered)

        states = await states_of(order[0])
        for minibatch, following in zip(order, [*order[1:], None], strict=True):
            if following is None:
                await self._update(minibatch, states)
            elif self.is_ahead:
                _, states = await asyncio.gather(self._update(minibatch, states), states_of(following))
            else:
                await self._update(minibatch, states)
                states = await states_of(following)
