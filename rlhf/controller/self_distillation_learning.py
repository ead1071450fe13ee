"""Learn from the policy with a privileged prompt, which computes in the policy's ranks.

contexts -> batch plan of the taught responses -> privileged prompts -> teacher's pass -> minibatches -> updates
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.self_distillation import SelfDistillation
from rlhf.config.derive import responses_per_step
from rlhf.config.schema.root import Config
from rlhf.controller.batches import only, plan_batch
from rlhf.controller.learning import Learning, OnlineRoles, Signals
from rlhf.controller.privileged import contexts_of, privileged_prompts
from rlhf.controller.record import RunRecord
from rlhf.roles import ScoredGroup
from rlhf.tracking.metrics.reductions import Mean
from rlhf.types import BatchPlan

logger = logging.getLogger(__name__)


class SelfDistillationLearning(Learning):
    """Trains on the responses with a teacher."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        self.algorithm = algorithm_of(config.algorithm, SelfDistillation)

    def arrived(self, scored: ScoredGroup) -> None:
        """Begin nothing: the teacher computes in the policy's ranks."""

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        record, policy = self.record, self.roles.policy
        every = [contexts_of(scored, self.algorithm.config) for scored in groups]
        pairs = [(scored, contexts) for scored, contexts in zip(groups, every, strict=True) if contexts]
        taught = [
            only(scored, [i for i, info in enumerate(scored.group.infos) if info.sequence_id in contexts])
            for scored, contexts in pairs
        ]
        num_responses = sum(len(scored.group.infos) for scored in groups)
        num_taught = sum(len(scored.group.infos) for scored in taught)
        record.add({"experience/privileged/fraction": Mean(total=num_taught, count=num_responses)})
        if not taught:
            logger.warning("step %d: no response has a better response or feedback, so nothing is updated", step)
            return Signals()
        plan = self._plan(groups, taught, step)
        with record.stage("experience"):
            prompts = await privileged_prompts(self.roles.reward, taught, [contexts for _, contexts in pairs])
            record.add((await policy.prepare(plan, [scored.group for scored in taught], prompts)).metrics)
        with record.stage("update"):
            for minibatch in self.visits(len(plan.minibatches), step):
                record.add(await policy.forward_backward(minibatch))
                record.add(await policy.optim_step())
        trained = frozenset(info.sequence_id for scored in taught for info in scored.group.infos)
        return Signals(trained=trained, privileged=tuple(column.ref for column in prompts))

    def _plan(self, groups: Sequence[ScoredGroup], taught: Sequence[ScoredGroup], step: int) -> BatchPlan:
        """Return the step's minibatches. Their scores are GRPO's advantages, compared with the whole group."""
        plan = plan_batch(
            taught,
            step=step,
            seed=self.config.run.seed,
            num_minibatches=responses_per_step(self.rollouts) // self.config.train.sequences_per_update,
            num_ranks=self.roles.policy.num_ranks,
            kl_coef=0.0,
        )
        if not self.algorithm.config.reward_coef:
            return replace(plan, scores={})
        whole = self.scores.normalized(groups)
        ids = [info.sequence_id for scored in whole for info in scored.group.infos]
        scores = torch.tensor([score for scored in whole for score in scored.scores.scores], dtype=torch.float64)
        added = self.algorithm.reward_advantages(scores, group_size=self.rollouts.samples_per_prompt).tolist()
        return replace(plan, scores={i: value for i, value in zip(ids, added, strict=True) if i in plan.scores})
