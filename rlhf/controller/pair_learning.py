"""Learn from pairs: one of a prompt's responses is preferred to another (online and iterative DPO).

    pairs -> reference logprobs -> minibatches -> updates

A group with equal scores for all responses has no pair. Responses outside of pairs are not computed on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.online_config import FollowedReferenceConfig
from rlhf.algorithms.pairs import PairAlgorithm
from rlhf.config.schema.root import Config
from rlhf.controller.batches import only, plan_pairs, temperatures
from rlhf.controller.learning import OnlineRoles, ReferencedLearning, Signals
from rlhf.controller.record import RunRecord
from rlhf.roles import ScoredGroup
from rlhf.tracking.metrics.reductions import Mean, Sum

logger = logging.getLogger(__name__)


class PairLearning(ReferencedLearning):
    """Trains on at most one pair per prompt."""

    leaves_out = True

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        assert isinstance(config.algorithm, FollowedReferenceConfig)
        self.algorithm = algorithm_of(config.algorithm, PairAlgorithm)
        self.reference_every = config.algorithm.reference_every
        self.num_minibatches = self.rollouts.prompts_per_step // config.train.sequences_per_update

    def arrived(self, scored: ScoredGroup) -> None:
        """Begin the reference log-probabilities of the group's pair if the reference has separate hardware."""
        if self.computes_by_group and (pairs := self._pairs([scored])):
            self.columns.begin(scored, self.reference_logprobs(pairs))

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Run the stages listed in the module's docstring. Without a pair, the step makes no update."""
        record, pairs = self.record, self._pairs(groups)
        record.add(
            {
                "advantages/zero_groups/fraction": Mean(total=len(groups) - len(pairs), count=len(groups)),
                "preference/pairs/total": Sum(total=len(pairs)),
            }
        )
        if not pairs:
            logger.warning(
                "step %d: all responses to each prompt have the same score, so the policy is not updated", step
            )
        with record.stage("experience"):
            minibatches = await self._prepare(pairs, step) if pairs else 0
        with record.stage("update"):
            for minibatch in self.visits(minibatches, step):
                record.add(await self.roles.policy.forward_backward(minibatch))
                record.add(await self.roles.policy.optim_step())
        preferred = {info.sequence_id: place == 0 for pair in pairs for place, info in enumerate(pair.group.infos)}
        return Signals(trained=frozenset(preferred), preferred=preferred)

    async def _prepare(self, pairs: Sequence[ScoredGroup], step: int) -> int:
        """Give the policy the pairs and their reference logprobs. Returns the number of minibatches."""
        policy, groups = self.roles.policy, [pair.group for pair in pairs]
        plan = plan_pairs(
            [group.infos for group in groups],
            temperatures=temperatures(pairs),
            step=step,
            seed=self.config.run.seed,
            num_minibatches=self.num_minibatches,
            num_ranks=policy.num_ranks,
        )
        references = await self.columns.take(pairs, self.reference_logprobs)
        self.record.add((await policy.prepare(plan, groups, references)).metrics)
        return len(plan.minibatches)

    def _pairs(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups with a pair, reduced to the chosen response and then the rejected response."""
        chosen = [(scored, self.algorithm.pair(scored.scores.scores)) for scored in self.scores.normalized(groups)]
        return [only(scored, places) for scored, places in chosen if places is not None]
