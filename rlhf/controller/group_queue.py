"""Request single groups while the weights change, and form batches of finished groups.

    prompts -> outstanding groups -> scored groups -> the batch of a step

A group is outstanding from its request until the engines have the weights that were trained on it, or until the group
is dropped or filtered. At most (max_staleness + 1) * prompts_per_step groups are outstanding, and no more than are
needed so that the trainer never waits (rlhf.rollouts.pacing). The engines load new weights between two decoding steps,
so a response may span versions. The lag of a response's oldest token never exceeds max_staleness: a group beyond this
bound is requested again and never trained unchanged.

A checkpoint holds the ids and prompts of the outstanding groups. A resumed run requests the same groups again with the
same seeds. The engines answer finished groups from the store.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any, Literal, TypeVar

from rlhf.controller.collect import Collector, EpochPrompt, Outcomes
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_queue import Batch, unless_failed
from rlhf.role_table import ROLE_OF_STAGE
from rlhf.roles import Metrics, ScoredGroup
from rlhf.rollouts.pacing import Pace
from rlhf.tracking.metrics.reductions import Last, Mean, Reduction, Sum
from rlhf.types import GroupRequest, oldest_version

Order = Literal["prompt", "completion"]
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class _Outstanding:
    group_id: int
    chosen: EpochPrompt
    place: int  # unique among outstanding groups, so sequence ids differ within a batch
    version: int = 0  # version of the weights at the newest request
    since_s: float = 0.0  # clock at the first request, or at the first request of the group that this group replaces
    scored_s: float = 0.0  # clock at the scores
    request: GroupRequest | None = None  # None: not requested yet
    task: asyncio.Task[None] | None = None
    scored: ScoredGroup | None = None  # None: not finished


class _Load:
    """Integrates the number of groups in the engines over time."""

    def __init__(self) -> None:
        self.count = 0
        self.group_seconds = 0.0
        self.busy_s = 0.0  # seconds with at least one group in the engines
        self._since = time.perf_counter()

    def add(self, change: int) -> None:
        now = time.perf_counter()
        self.group_seconds += self.count * (now - self._since)
        self.busy_s += (now - self._since) * (self.count > 0)
        self.count += change
        self._since = now


class _StepClock:
    """Counts the seconds of training steps, from `request` to `synced`. An evaluation between steps is not counted."""

    def __init__(self) -> None:
        self._passed_s = 0.0
        self._runs_since: float | None = None

    def run(self) -> None:
        self._runs_since = time.perf_counter()

    def stop(self) -> None:
        self._passed_s, self._runs_since = self.now(), None

    def now(self) -> float:
        return self._passed_s + (0.0 if self._runs_since is None else time.perf_counter() - self._runs_since)


class GroupQueue:
    def __init__(
        self,
        collector: Collector,
        record: RunRecord,
        *,
        max_staleness: int,
        order: Order,
        num_steps: int,
        settings: str,
    ) -> None:
        """Create an empty queue. `settings`: digest of the settings that decide the groups of a batch."""
        self.collector = collector
        self.record = record
        self.max_staleness = max_staleness
        self.order = order
        self.num_steps = num_steps
        self.settings = settings
        self.prompts_per_step = collector.rollouts.prompts_per_step
        self.version = 0  # version of the weights in the engines
        self._outstanding: dict[int, _Outstanding] = {}  # by group id, in the order of the prompts
        self._waiting: deque[_Outstanding] = deque()  # groups of a resumed run that are not requested yet
        self._finished: list[int] = []  # kept groups, in the order of completion
        self._taken: Sequence[int] = ()  # the groups of the batch that is trained now
        self._left_out: list[_Outstanding] = []  # left out since the last batch; no step has recorded these groups
        self._outcomes = Outcomes()  # since the last batch
        self._metrics: list[Metrics] = []  # since the last batch
        self._tokens = 0  # sampled in the groups that finished since the last batch
        self._lengths = Mean(total=0.0, count=0)  # of all finished groups' responses
        self._free: list[int] = []  # unused places below the largest place, as a heap
        self._load = _Load()
        self.pace = Pace(
            prompts_per_step=self.prompts_per_step, max_staleness=max_staleness, by_completion=order == "completion"
        )
        self._clock, self._taken_s = _StepClock(), 0.0
        self._taken_at, self._busy_at_request, self._was_over = time.time(), 0.0, False
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None

    async def synced(self, version: int) -> None:
        """Continue with the new weights: forget the groups of the trained step, and request old groups and new ones."""
        self.version = version
        self._clock.stop()
        self._measure_pace()
        for group_id in self._taken:
            self._remove(group_id)
        self._finished = [group_id for group_id in self._finished if group_id in self._outstanding]
        self._taken = ()
        if not self._outstanding:
            self._taken_at = time.time()  # the first rollouts begin now
        late = [entry for entry in self._outstanding.values() if entry.scored is None and self._is_old(entry.version)]
        if late:
            await self.collector.scorer.rollout.cancel([entry.request for entry in late if entry.request is not None])
        for entry in self._outstanding.values():
            if entry.scored is not None and self._is_old(oldest_version(entry.scored.group.infos)):
                self._finished.remove(entry.group_id)
                self._outcomes.cancelled.append(entry.scored.group.request)
                self.collector.outdated([entry.scored])
                entry.scored = None
                self._start(entry)
        self._admit()

    def request(self, step: int) -> None:
        """Begin to measure a step. The groups are requested as soon as the bound and the pace allow."""
        self._clock.run()
        self._load.add(0)
        self._busy_at_request = self._load.busy_s
        left = (self.num_steps - self.version) * self.prompts_per_step
        self._was_over = not self._load.count and len(self._outstanding) == left

    def _is_old(self, version: int | None) -> bool:
        """Return whether a token of this version lags too much in the next training step. None: there is no token."""
        return version is not None and version < self.version - self.max_staleness

    def _measure_pace(self) -> None:
        trained = [self._outstanding[group_id] for group_id in self._taken]
        if trained:
            group_s = [entry.scored_s - entry.since_s for entry in trained]
            is_warm = min(entry.since_s for entry in trained) > 0.0
            self.pace.trained(group_s, self._clock.now() - self._taken_s, is_warm=is_warm)

    def _admit(self, *, since_s: float | None = None) -> None:
        """Request groups as the pace demands. The last steps need fewer groups. The groups that a resumed run had
        requested before are requested at once, up to the bound."""
        bound = min(self.max_staleness + 1, self.num_steps - self.version) * self.prompts_per_step
        while len(self._outstanding) < (bound if self._waiting else min(bound, self.pace.num_outstanding)):
            if self._waiting:
                entry = self._waiting.popleft()
            else:
                (chosen,) = self.collector.next(1)
                entry = _Outstanding(group_id=self.collector.next_group, chosen=chosen, place=self._free_place())
                self.collector.next_group += 1
            entry.since_s = self._clock.now() if since_s is None else since_s
            self._outstanding[entry.group_id] = entry
            self._start(entry)

    def _free_place(self) -> int:
        largest = len(self._outstanding) + len(self._waiting) + len(self._left_out)
        return heapq.heappop(self._free) if self._free else largest

    def _start(self, entry: _Outstanding) -> None:
        with self.record.apart(self._metrics):
            entry.task = asyncio.create_task(self._collect(entry))
        entry.task.add_done_callback(self._note_end)

    def _remove(self, group_id: int) -> None:
        heapq.heappush(self._free, self._outstanding.pop(group_id).place)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._changed.set()

    async def _collect(self, entry: _Outstanding) -> None:
        """Request a group until the tokens are new enough. Keep the group, or request a new prompt in its place."""
        collector = self.collector
        entry.request = collector.request(entry.chosen, group_id=entry.group_id, place=entry.place)
        scored = await self._answer(entry, entry.request)
        while scored is None or self._is_old(oldest_version(scored.group.infos)):
            self._outcomes.cancelled.append(entry.request)
            scored = await self._answer(entry, entry.request)
        lengths = [info.num_response_tokens for info in scored.group.infos]
        self._tokens += sum(lengths)
        self._lengths = self._lengths.merge(Mean.of(lengths))
        if collector.sort(scored, self._outcomes, self.version + 1):
            entry.scored, entry.scored_s = scored, self._clock.now()
            self._finished.append(entry.group_id)
            if collector.arrived is not None:
                collector.arrived(scored)
        else:
            collector.check_filtered(self._outcomes, self.version + 1)
            self._left_out.append(self._outstanding.pop(entry.group_id))
            self._admit(since_s=entry.since_s)

    async def _answer(self, entry: _Outstanding, request: GroupRequest) -> ScoredGroup | None:
        """Return the scored group, or None for a request cancelled because of its age."""
        collector, scorer, entry.version = self.collector, self.collector.scorer, self.version
        oldest, step = self.version - self.max_staleness, self.version + 1
        self._load.add(1)
        try:
            group = await scorer.rollout.answer(request, collector.sampling, oldest=oldest)
        finally:
            self._load.add(-1)
        if group is None:
            return None
        newest = max(info.max_version for info in group.infos)
        scored = await scorer.score(group, collector.sampling, step=step, version=newest)
        if collector.config.algorithm.wants_greedy:
            (scored,) = await scorer.add_greedy_baseline([scored], collector.sampling, step=step, version=oldest)
        return scored

    async def take(self, step: int) -> Batch:
        while (chosen := self._first_finished()) is None:
            if self._failure is not None:
                raise self._failure
            ready = min(len(self._finished), self.prompts_per_step)
            self.record.progress.stage("rollouts", ready, self.prompts_per_step)
            self._changed.clear()
            await self._changed.wait()
        self._taken, self._taken_s = chosen, self._clock.now()
        groups = [scored for scored in (self._outstanding[i].scored for i in sorted(chosen)) if scored is not None]
        outcomes, self._outcomes = self._outcomes, Outcomes()
        for entry in self._left_out:
            heapq.heappush(self._free, entry.place)
        self._left_out = []
        outcomes.kept = groups
        metrics, self._metrics[:] = list(self._metrics), []
        with self.record.apart(metrics):
            collected = self.collector.finish(outcomes, step)
            self.record.add(self._measured(outcomes))
        sampled, self._tokens = self._tokens, 0
        return Batch(collected=replace(collected, sampled_tokens=sampled), metrics=metrics)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        failing = asyncio.ensure_future(self._until_failed())
        try:
            return await unless_failed(work, failing)
        finally:
            failing.cancel()

    async def _until_failed(self) -> None:
        while self._failure is None:
            self._changed.clear()
            await self._changed.wait()
        raise self._failure

    def _first_finished(self) -> Sequence[int] | None:
        """Return the groups of the next batch, or None if a needed group is not finished."""
        count = self.prompts_per_step
        if self.order == "completion":
            return self._finished[:count] if len(self._finished) >= count else None
        first = islice(self._outstanding.values(), count)
        finished = [entry.group_id for entry in takewhile(lambda entry: entry.scored is not None, first)]
        return finished if len(finished) == count else None

    def _measured(self, outcomes: Outcomes) -> Mapping[str, Reduction]:
        began, self._taken_at = self._taken_at, time.time()
        load = self._load
        load.add(0)
        self.record.timeline.record("rollouts", ROLE_OF_STAGE["rollouts"], start_s=began, end_s=self._taken_at)
        trained = Mean.of([info.num_response_tokens for scored in outcomes.kept for info in scored.group.infos])
        metrics: dict[str, Reduction] = {
            "time/rollouts_s": Sum(total=self._taken_at - began),
            "rollouts/in_flight/mean": Mean(total=load.group_seconds, count=self._taken_at - began),
            "rollouts/reasked_groups/total": Sum(total=len(outcomes.cancelled)),
        }
        if self.order == "completion":
            metrics["rollouts/completion_bias"] = Last(value=trained.result() / self._lengths.result())
        load.group_seconds = 0.0
        return metrics

    async def until_weights_may_change(self) -> None:
        """Return at once, since a response may span versions."""
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> Sequence[GroupRequest]:
        """Give up the unfinished groups, and return the requests in progress. The next start requests all groups."""
        tasks = [entry.task for entry in self._outstanding.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        entries = list(self._outstanding.values())
        unfinished = [entry.request for entry in entries if entry.scored is None and entry.request is not None]
        for entry in entries:
            entry.scored = None
        self._waiting.extendleft(reversed(entries))
        self._outstanding, self._finished, self._taken = {}, [], ()
        return unfinished

    @property
    def seconds(self) -> float | None:
        self._load.add(0)
        return None if self._was_over else self._load.busy_s - self._busy_at_request

    def state(self) -> dict[str, Any]:
        """Return the position in the prompts and the outstanding groups, for a checkpoint. A run without updates in
        flight requests the prompts in `waiting`."""
        entries = {entry.group_id: entry for entry in [*self._outstanding.values(), *self._waiting, *self._left_out]}
        outstanding = [(i, e.chosen[0], e.chosen[1].prompt_id, e.place) for i, e in sorted(entries.items())]
        state = self.collector.state(untrained=entries)
        waiting = [(epoch, prompt_id) for _, epoch, prompt_id, _ in outstanding] + state["waiting"]
        return state | {"waiting": waiting, "ahead": [], "settings": self.settings, "outstanding": outstanding}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the position in the prompts. The outstanding groups are requested again first."""
        self.collector.restore(state)
        outstanding = state.get("outstanding", [])
        del self.collector.unfinished[: len(outstanding)]
        for group_id, epoch, prompt_id, place in outstanding:
            chosen = (epoch, self.collector.prompts.at(prompt_id))
            self._waiting.append(_Outstanding(group_id=group_id, chosen=chosen, place=place))
        used = {entry.place for entry in self._waiting}
        self._free = [place for place in range(max(used, default=0)) if place not in used]
