"""Run pools of reward and reference workers: independent processes that share the groups of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.cluster.waiting import CALL_LIMIT
from actors.roles.group import (
    END_WITHIN_S,
    STOP_LIMIT,
    ModelGroup,
    SpawnOne,
    WorkerGroup,
    WorkerPool,
    all_results,
    spawn,
)
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.data.examples import Example, collate
from rlhf.data.packing import balance
from rlhf.errors import WorkerLost
from rlhf.evaluation.results import ExampleResult
from rlhf.evaluation.voting import AnswerForm
from rlhf.process.suspects import CallLost, Suspects
from rlhf.rewards.processes.pool import GroupOutcome
from rlhf.rewards.scoring import ask_deadline_s, asks_in_flight
from rlhf.rewards.scoring import deadline_s as longest_s
from rlhf.role_table import Role
from rlhf.roles import CompletedGroup, Ref, RemoteColumns, SampleSelection
from rlhf.rollouts.records.texts import Transcript
from rlhf.types import (
    GroupScores,
    PrivilegedContext,
    PrivilegedPrompts,
    RewardError,
    RewardErrorKind,
    TokenSignals,
    TokenValues,
)
from rlhf.workers.frozen.reward import RewardSettings, RewardWorker

T = TypeVar("T")


class RewardWorkers(WorkerPool):
    """The reward role of a run, as a pool of workers."""

    role: Role = "reward"

    def __init__(
        self,
        handles: Sequence[ActorHandle[Any]],
        spawn_one: SpawnOne | None = None,
        *,
        settings: RewardSettings,
        deadline_s: float,
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.settings = settings
        self.free = [asyncio.Semaphore(settings.processes) for _ in handles]
        self.free_to_ask = [asyncio.Semaphore(asks_in_flight(settings.specs)) for _ in handles]
        self.suspects = [Suspects() for _ in handles]

    @classmethod
    def create(
        cls,
        cluster: ClusterConfig,
        placement: Placement,
        settings: RewardSettings,
        *,
        longest_sequence: int,
        images: Path | None = None,
    ) -> RewardWorkers:
        options: dict[str, Any] = {"longest_sequence": longest_sequence, "images": images}
        options["concurrency"] = settings.concurrency
        spawned = spawn(cluster, placement, cls.role, RewardWorker, settings, **options)
        return cls(*spawned, settings=settings, deadline_s=cluster.call_timeout_s)

    def _start_calls(self, handle: ActorHandle[Any]) -> list[ObjectRef[Any]]:
        return [handle.start.remote(greets=False)]

    def _worker_of(self, group: CompletedGroup) -> int:
        """Return the worker of a group. Groups go to the workers in turn."""
        return group.request.group_id % len(self.handles)

    async def score(self, group: CompletedGroup) -> GroupScores:
        """Score a group. Groups go to the workers in turn, and each worker runs a group in each process at once. The
        time limit starts with the work on a group. Services are asked earlier, for more groups at once."""
        worker = self._worker_of(group)
        errors = tuple(info.environment_error for info in group.infos if info.environment_error is not None)
        if errors:
            return GroupScores(scores=(), by_name={}, errors=errors)
        truncated = tuple(info.finish_reason == "length" for info in group.infos)
        environment = tuple(info.environment_rewards for info in group.infos)
        ends = (info.session for info in group.infos)
        results = tuple(end.result for end in ends if end is not None)
        longest = longest_s(self.settings.specs, len(truncated), timeout_s=self.settings.timeout_s)
        prompt = group.request.prompt
        try:
            answers = await self._ask(worker, group, truncated, results)
            async with self.free[worker]:
                return await self._call(
                    worker,
                    lambda h: h.score.remote(prompt, group.rollouts, truncated, answers, environment, results),
                    stage="rewards",
                    longest=longest,
                )
        except CallLost as again:
            return _ends_its_worker(group, again.losses[-1])

    async def _ask(
        self, worker: int, group: CompletedGroup, truncated: tuple[bool, ...], results: tuple[str | None, ...]
    ) -> dict[str, GroupOutcome]:
        prompt = group.request.prompt
        if not any(spec.remote is not None and spec.applies_to(prompt.columns) for spec in self.settings.specs):
            return {}
        longest = ask_deadline_s(self.settings.specs, len(truncated))
        async with self.free_to_ask[worker]:
            return await self._call(
                worker,
                lambda h: h.ask.remote(prompt, group.rollouts, truncated, results),
                stage="services",
                longest=longest,
            )

    async def _call(self, worker: int, send: Callable[[Any], ObjectRef[T]], *, stage: str, longest: float) -> T:
        """Return a result for a group. After a loss of the worker, the call is made again. CallLost: a second loss."""

        async def attempt() -> T:
            handle, limit = await self.working(worker), f"the limits of the rewards and {CALL_LIMIT}"
            limit_s = longest + self.deadline_s
            try:
                answer: T = await self.one(send(handle), stage, rank=worker, deadline_s=limit_s, limit=limit)
            except WorkerLost as lost:
                await self.make_good(worker, handle, lost)
                raise CallLost(self.last_loss[worker]) from lost
            if self.supervisor is not None:  # the worker works: the groups were the cause
                self.supervisor.forgive(self.suspects[worker].take_caused())
            return answer

        return await self.suspects[worker].call(attempt)

    async def texts(self, group: CompletedGroup) -> list[str]:
        return await self.ask(self._worker_of(group), lambda h: h.texts.remote(group.rollouts), "texts")

    async def transcripts(self, group: CompletedGroup) -> list[Transcript]:
        return await self.ask(self._worker_of(group), lambda h: h.transcripts.remote(group.rollouts), "texts")

    async def answers(self, group: CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        return await self.ask(self._worker_of(group), lambda h: h.answers.remote(group.rollouts, form), "eval")

    async def privileged_prompts(
        self, group: CompletedGroup, contexts: Mapping[int, PrivilegedContext]
    ) -> RemoteColumns[PrivilegedPrompts]:
        (column,) = await self.columns(
            self._worker_of(group),
            lambda h: h.privileged_prompts.options(num_returns=2).remote(
                group.request.prompt, group.rollouts, contexts
            ),
            "experience",
            work=group.request.group_id,
        )
        return RemoteColumns(ref=column, sequence_ids=tuple(contexts))

    async def write_samples(
        self,
        path: Path,
        selections: Sequence[SampleSelection],
        signals: Sequence[Ref[TokenSignals] | Ref[PrivilegedPrompts]] = (),
    ) -> None:
        records = [selection.records for selection in selections]
        rollouts = [selection.rollouts for selection in selections]
        await self.ask(0, lambda h: h.write_samples.remote(path, records, *rollouts, *signals), "samples")

    async def stop(self) -> None:
        stops = [h.stop.remote() for h in self.handles]
        await self.all(stops, "stop", deadline_s=END_WITHIN_S, limit=STOP_LIMIT)
        self.end()


def _ends_its_worker(group: CompletedGroup, lost: WorkerLost) -> GroupScores:
    """Return an error for each response of a group that lost a worker twice."""
    kind: RewardErrorKind = "timeout" if lost.kind == "hung" else "died"
    message = (
        f"the reward worker was lost while it scored this group, and again while it scored only this group. {lost}"
    )
    prompt_id = group.request.prompt.prompt_id
    errors = tuple(
        RewardError(reward="worker", kind=kind, message=message, prompt_id=prompt_id, sample=sample)
        for sample in range(len(group.infos))
    )
    return GroupScores(scores=(), by_name={}, errors=errors)


class ReferenceWorkers(ModelGroup, WorkerPool):
    """The reference role of a run, as a pool of workers."""

    role: Role = "reference"
    folder: Path | None = None  # folder of the present model; None: the configured model
    is_away = False  # whether the model has left a GPU shared with an engine

    def _start_calls(self, handle: ActorHandle[Any]) -> list[ObjectRef[Any]]:
        calls = super()._start_calls(handle)
        if self.folder is not None:
            calls.append(handle.become.remote(str(self.folder)))
        if self.is_away:
            calls.append(handle.offload.remote())
        return calls

    async def offload(self) -> None:
        self.is_away = True
        await super().offload()

    async def reload(self) -> None:
        self.is_away = False
        await super().reload()

    async def become(self, folder: Path) -> None:
        self.folder = folder
        await self.each(lambda h: h.become.remote(str(folder)), "reference")

    async def logprobs(
        self,
        groups: Sequence[CompletedGroup],
        *,
        only: frozenset[int] | None = None,
        temperatures: Mapping[int, float] | None = None,
    ) -> list[RemoteColumns[TokenValues]]:
        return await self.columns_of_groups(groups, only, temperatures or {})

    async def columns_of_groups(
        self, groups: Sequence[CompletedGroup], *given: Any, **options: Any
    ) -> list[RemoteColumns[TokenValues]]:
        """Return a column for each group. The workers share the groups evenly, and each packs its groups together.
        Single groups go to workers in turn. given, options: arguments of the worker's `logprobs` beside the groups."""

        def compute(place: int, share: Sequence[int]) -> Awaitable[Sequence[Ref[TokenValues]]]:
            rollouts = [groups[i].rollouts for i in share]
            return self.columns(
                place % len(self.handles),
                lambda h: h.logprobs.options(num_returns=len(share) + 1).remote(*given, *rollouts, **options),
                self.role,
                work=tuple(groups[i].request.group_id for i in share),
            )

        shares = balance([1] * len(groups), min(len(self.handles), len(groups)))
        first = groups[0].request.group_id if groups else 0
        refs = await all_results([compute(place, share) for place, share in enumerate(shares, first)])
        by_group = {i: ref for share, own in zip(shares, refs, strict=True) for i, ref in zip(share, own, strict=True)}
        return [
            RemoteColumns(ref=by_group[i], sequence_ids=group.columns.sequence_ids) for i, group in enumerate(groups)
        ]


class LikelihoodWorkers(WorkerGroup):
    """Workers measuring supervised examples, for an evaluation outside of a run."""

    role: Role = "policy"

    async def measure(self, examples: Sequence[Example]) -> list[ExampleResult]:
        """Return a result for each example, in order. The examples are distributed by equal work."""
        shares = balance([len(example.token_ids) for example in examples], len(self.handles))
        shares = [share for share in shares if share]
        refs = [
            handle.measure.remote(collate([examples[i] for i in share]))
            for handle, share in zip(self.handles, shares, strict=False)
        ]
        results_by_worker: list[list[ExampleResult]] = await self.all(refs, "eval")
        by_row = {
            i: result
            for share, results in zip(shares, results_by_worker, strict=True)
            for i, result in zip(share, results, strict=True)
        }
        return [by_row[i] for i in range(len(examples))]
