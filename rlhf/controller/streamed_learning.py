"""Learn from the first groups of a batch while later groups are still sampled (train.streamed).

    ready groups -> portion -> experience -> gradient of the first minibatch, until the batch is whole -> updates

A portion has all ready groups. The ranks add the portion's gradient to a sum (rlhf.workers.online.streamed).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlhf.config.derive import trained_per_prompt
from rlhf.config.schema.root import Config
from rlhf.controller.advantage_learning import AdvantageLearning, Experience
from rlhf.controller.batches import draw_minibatches
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.record import RunRecord
from rlhf.roles import ScoredGroup, TrainedRole
from rlhf.types import BatchPlan, RolloutInfo, StepReward


class Arrivals:
    """The kept groups of batches in turn, `size` groups each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.begin()

    def begin(self) -> None:
        """Expect the first group of a batch."""
        self._left = self.size
        self.groups: list[ScoredGroup] = []  # groups of the batch so far
        self._num_taken = 0
        self._changed = asyncio.Event()

    def rewind(self) -> None:
        """Hand over the groups of the batch again from the first."""
        self._num_taken = 0
        if self.groups:
            self._changed.set()

    def replace(self, groups: Sequence[ScoredGroup]) -> None:
        """Replace the first arrived groups."""
        self.groups[: len(groups)] = groups

    def add(self, scored: ScoredGroup) -> None:
        self._left -= 1
        self.groups.append(scored)
        self._changed.set()

    async def take(self) -> list[ScoredGroup]:
        """Return all arrived groups not yet taken, at least one. Empty: the batch is whole."""
        await self._changed.wait()
        if self._left <= 0:
            return []
        self._changed.clear()
        begin, self._num_taken = self._num_taken, len(self.groups)
        return self.groups[begin:]


class StreamedAdvantageLearning(AdvantageLearning):
    """Computes experience and gradients portion by portion, with the updates of the whole batch."""

    def __init__(self, config: Config, roles: OnlineRoles, record: RunRecord) -> None:
        super().__init__(config, roles, record)
        self.arrivals = Arrivals(self.rollouts.prompts_per_step)
        self.portions: list[Experience] = []  # portions of the step's batch
        self._seen: set[int] = set()  # ids of the groups in the portions

    def arrived(self, scored: ScoredGroup) -> None:
        self.arrivals.add(scored)
        super().arrived(scored)

    async def stream(self, step: int) -> float:
        """Learn from all portions of a batch except the last, left to `learn`. Return the seconds of this work."""
        busy_s = 0.0
        first_visited = self.visits(self.num_minibatches, step)[0]
        while groups := await self.arrivals.take():
            began = time.perf_counter()
            await self._add_portion(groups, step)
            if self.portions[-1].plan.scores:
                with self.record.stage("update"):
                    await self.roles.policy.forward_backward(first_visited, ends=False)
            busy_s += time.perf_counter() - began
        self.arrivals.begin()
        return busy_s

    async def learn(self, groups: Sequence[ScoredGroup], step: int) -> Signals:
        if left := [scored for scored in groups if scored.group.request.group_id not in self._seen]:
            await self._add_portion(left, step)
        portions, self.portions, self._seen = self.portions, [], set()
        return await self.update_from(portions, groups, step)

    def begin_again(self) -> None:
        """Forget the gradients of a begun step after the loss of ranks."""
        self.portions, self._seen = [], set()
        self.arrivals.rewind()

    async def _add_portion(self, groups: Sequence[ScoredGroup], step: int) -> None:
        self.portions.append(await self.prepare(groups, step))
        self._seen.update(scored.group.request.group_id for scored in groups)

    def plan(
        self,
        groups: Sequence[ScoredGroup],
        step: int,
        role: TrainedRole,
        steps: Mapping[int, tuple[StepReward, ...]],
        drawn: Sequence[Sequence[RolloutInfo]] | None = None,
    ) -> BatchPlan:
        plan = super().plan(groups, step, role, steps, self._drawn(groups, step) if self.num_minibatches > 1 else None)
        return replace(plan, portion=sum(bool(portion.plan.scores) for portion in self.portions))

    def _drawn(self, groups: Sequence[ScoredGroup], step: int) -> list[list[RolloutInfo]]:
        """Return a portion's minibatches, as drawn from the whole batch. The draw is known beforehand: each prompt of
        the batch has a group, and all groups have the same size."""
        (count, _), samples = trained_per_prompt(self.config, self.rollouts), self.rollouts.samples_per_prompt
        members = [[(place, i) for i in range(count)] for place in range(self.rollouts.prompts_per_step)]
        infos = {scored.group.request.first_sequence_id // samples: scored.group.infos for scored in groups}
        seed, number = self.config.run.seed, self.num_minibatches
        drawn = draw_minibatches(members, step=step, seed=seed, num_minibatches=number)
        return [[infos[place][i] for place, i in chosen if i < len(infos.get(place, ()))] for chosen in drawn]
