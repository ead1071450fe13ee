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
from rlhf.controller.batches import plan_pairs, temperatures
from rlhf.controller.learning import OnlineRoles, ReferencedLearning, Signals
from rlhf.controller.record import RunRecord
from rlhf.roles import RemoteColumns, ScoredGroup
from rlhf.tracking.metrics.reductions import Mean, Sum
from rlhf.types import RolloutInfo, TokenValues

logger = logging.getLogger(__name__)
Pair = tuple[RolloutInfo, RolloutInfo]  # chosen and rejected


class PairLearning(ReferencedLearning):
    """Trains on at most one pair per prompt."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        assert isinstance(config.algorithm, FollowedReferenceConfig)
        self.algorithm = algorithm_of(config.algorithm, PairAlgorithm)
        self.reference_every = config.algorithm.reference_every
        self.num_minibatches = self.rollouts.prompts_per_step // config.train.sequences_per_update

    def arrived(self, scored: ScoredGroup) -> None:
        """Begin the reference log-probabilities of the group's pair if the reference has separate hardware."""
        (normalized,) = self.scores.normalized([scored])
        pair = self._pair(normalized) if self.computes_by_group else None
        if pair is not None:
            self.columns.begin(scored, self._reference_logprobs([(normalized, pair)]))

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        """Run the stages listed in the module's docstring. Without a pair, the step makes no update."""
        record = self.record
        groups = self.scores.normalized(groups)
        paired = [(scored, pair) for scored in groups if (pair := self._pair(scored)) is not None]
        record.add(
            {
                "advantages/zero_groups/fraction": Mean(total=len(groups) - len(paired), count=len(groups)),
                "preference/pairs/total": Sum(total=len(paired)),
            }
        )
        if not paired:
            logger.warning(
                "step %d: all responses to each prompt have the same score, so the policy is not updated", step
            )
        with record.stage("experience"):
            minibatches = await self._prepare(paired, step) if paired else 0
        with record.stage("update"):
            for minibatch in self.visits(minibatches, step):
                record.add(await self.roles.policy.update(minibatch))
        pairs = [pair for _, pair in paired]
        preferred = {info.sequence_id: place == 0 for pair in pairs for place, info in enumerate(pair)}
        return Signals(trained=frozenset(preferred), preferred=preferred)

    async def _prepare(self, paired: Sequence[tuple[ScoredGroup, Pair]], step: int) -> int:
        """Give the policy the pairs and their reference logprobs. Returns the number of minibatches."""
        pairs, policy = [pair for _, pair in paired], self.roles.policy
        plan = plan_pairs(
            pairs,
            temperatures=temperatures([scored for scored, _ in paired]),
            step=step,
            seed=self.config.run.seed,
            num_minibatches=self.num_minibatches,
            num_ranks=policy.num_ranks,
        )
        references = await self.columns.take([scored for scored, _ in paired])
        if references is None:
            references = await self._reference_logprobs(paired)
        groups = [scored.group for scored, _ in paired]
        self.record.add((await policy.prepare(plan, groups, references)).metrics)
        return len(plan.minibatches)

    async def _reference_logprobs(self, paired: Sequence[tuple[ScoredGroup, Pair]]) -> list[RemoteColumns[TokenValues]]:
        """Return a column of the reference for each pair's group; none without a reference."""
        if self.roles.reference is None:
            return []
        return await self.roles.reference.logprobs(
            [scored.group for scored, _ in paired],
            only=frozenset(info.sequence_id for _, pair in paired for info in pair),
            temperatures=temperatures([scored for scored, _ in paired]),
        )

    def _pair(self, scored: ScoredGroup) -> Pair | None:
        places = self.algorithm.pair(scored.scores.scores)
        return None if places is None else (scored.group.infos[places[0]], scored.group.infos[places[1]])
