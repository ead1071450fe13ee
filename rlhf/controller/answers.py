"""From requests to scored groups: what training steps and evaluations have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from rlhf.controller.record import RunRecord
from rlhf.controller.sampling import environment_failures
from rlhf.data.prompts import rollout_seed
from rlhf.roles import CompletedGroup, RewardRole, RolloutRole, ScoredGroup
from rlhf.rollouts.identity import scored_identity
from rlhf.rollouts.ledger import ScoreLedger
from rlhf.tracking.errors import ErrorRecord
from rlhf.tracking.reductions import Sum
from rlhf.types import GroupRequest, Prompt, RewardError, Sampling

T = TypeVar("T")


def request_for(
    prompt: Prompt, *, group_id: int, first_sequence_id: int, samples: int, run_seed: int, epoch: int = 0
) -> GroupRequest:
    """So many samples of a prompt. Their seeds are the prompt's own, whenever and wherever it is answered."""
    return GroupRequest(
        group_id=group_id,
        prompt=prompt,
        seeds=tuple(rollout_seed(run_seed, epoch, prompt.prompt_id, sample) for sample in range(samples)),
        first_sequence_id=first_sequence_id,
    )


def error_record(error: RewardError, *, step: int) -> ErrorRecord:
    """The line of errors.jsonl for a reward that failed."""
    return ErrorRecord(
        step=step,
        stage="rewards",
        kind=error.kind,
        message=error.message,
        source=error.reward,
        prompt_id=error.prompt_id,
        sample=error.sample,
    )


async def answered(
    rollout: RolloutRole,
    requests: Sequence[GroupRequest],
    sampling: Sampling,
    then: Callable[[CompletedGroup, int], Coroutine[Any, Any, T]],
) -> list[T]:
    """What `then` makes of each answered request, in their order. It is begun while other requests are still answered;
    it gets the group and how many are answered by now."""
    tasks: dict[int, asyncio.Task[T]] = {}

    try:
        async for group in rollout.generate(requests, sampling):
            tasks[group.request.group_id] = asyncio.create_task(then(group, len(tasks) + 1))
        return [await tasks[request.group_id] for request in requests]
    finally:
        for task in tasks.values():
            task.cancel()


class Answers:
    """Responses with their scores, written down so that a resumed run takes up the same ones."""

    def __init__(
        self, rollout: RolloutRole, reward: RewardRole, record: RunRecord, *, rewards_fingerprint: str
    ) -> None:
        self.rollout = rollout
        self.reward = reward
        self.record = record
        self.ledger = ScoreLedger(record.folder.spool, rewards=rewards_fingerprint)

    async def to(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, step: int, version: int
    ) -> list[ScoredGroup]:
        """Responses and scores for all requests, in their order. Each group is scored while others still generate.

        step: whose row and errors these are. version: of the weights that answer.
        """

        async def score(group: CompletedGroup, num_done: int) -> ScoredGroup:
            self.record.progress.stage("rollouts", num_done, len(requests))
            return await self._score(group, sampling, step=step, version=version)

        return await answered(self.rollout, requests, sampling, score)

    async def _score(self, group: CompletedGroup, sampling: Sampling, *, step: int, version: int) -> ScoredGroup:
        group_id, request = group.request.group_id, scored_identity(group.request, sampling, group.infos)
        scores = self.ledger.get(group_id, version, request)
        if scores is None:
            scores = await self.reward.score(group)
            self.ledger.put(group_id, version, request, scores)
        for error in scores.errors:
            self.record.tracker.log_error(error_record(error, step=step))
        self.record.add({"rewards/errors/total": Sum(total=len(scores.errors)), **environment_failures(group.infos)})
        return ScoredGroup(group=group, scores=scores)
