"""Turn requests into scored groups, for training steps and evaluations alike."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_report import environment_failures
from rlhf.data.prompts import rollout_seed
from rlhf.errors import ResultsLost
from rlhf.roles import CompletedGroup, RewardRole, RolloutRole, ScoredGroup
from rlhf.rollouts.records.begun import begun_groups
from rlhf.rollouts.records.ledgers import (
    GREEDY_GROUPS,
    FinishOrderLedger,
    ScoreLedger,
    is_from,
    request_set_digest,
    scored_identity,
)
from rlhf.rollouts.records.spool import drop_untrained, stored_groups
from rlhf.tracking.metrics.reductions import Sum
from rlhf.tracking.run_folder.atomic import make_folder, write_aside
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.types import GroupRequest, Prompt, RewardError, Sampling

T = TypeVar("T")
ARCHIVE = "groups.tar"  # archive of the groups in a checkpoint


def request_for(
    prompt: Prompt,
    *,
    group_id: int,
    first_sequence_id: int,
    samples: int,
    run_seed: int,
    epoch: int = 0,
    temperature: float | None = None,
) -> GroupRequest:
    """Return a request for samples of a prompt. A seed depends only on run, epoch, prompt and sample index."""
    return GroupRequest(
        group_id=group_id,
        prompt=prompt,
        seeds=tuple(rollout_seed(run_seed, epoch, prompt.prompt_id, sample) for sample in range(samples)),
        first_sequence_id=first_sequence_id,
        temperature=temperature,
        epoch=epoch,
    )


def error_record(error: RewardError, *, step: int, split: str, model: str | None = None) -> ErrorRecord:
    return ErrorRecord(
        step=step,
        stage="rewards",
        kind=error.kind,
        message=error.message,
        source=error.reward,
        split=split,
        model=model,
        prompt_id=error.prompt_id,
        sample=error.sample,
    )


def note_errors(scored: ScoredGroup, record: RunRecord, *, step: int, split: str, model: str | None = None) -> None:
    errors = (*scored.scores.errors, *scored.scores.scored_errors)
    for error in errors:
        record.tracker.log_error(error_record(error, step=step, split=split, model=model))
    by_name = Counter(error.reward for error in errors)
    record.add({f"rewards/{name}/failures/total": Sum(total=count) for name, count in by_name.items()})
    record.add({"rewards/errors/total": Sum(total=len(errors)), **environment_failures(scored.group.infos)})


async def answers_in_flight(
    rollout: RolloutRole, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
) -> AsyncIterator[CompletedGroup]:
    """Answer requests before waiting requests, and yield each completed group at once. The caller makes sure that the
    engines keep the weights of `version` until then."""
    answers = [
        asyncio.create_task(rollout.answer(request, sampling, oldest=version, urgent=True)) for request in requests
    ]
    try:
        for answer in asyncio.as_completed(answers):
            group = await answer
            assert group is not None, "nobody cancels these requests"
            yield group
    finally:
        for task in answers:
            task.cancel()


async def process_answers(
    answers: AsyncIterator[CompletedGroup],
    requests: Sequence[GroupRequest],
    process: Callable[[CompletedGroup, int], Coroutine[Any, Any, T]],
) -> list[T]:
    """Apply `process` to each answered request, while later requests generate. Return the results in request order.
    `process` receives the group and the number of answered groups so far."""
    tasks: dict[int, asyncio.Task[T]] = {}
    try:
        async for group in answers:
            tasks[group.request.group_id] = asyncio.create_task(process(group, len(tasks) + 1))
        return [await tasks[request.group_id] for request in requests]
    finally:
        for task in tasks.values():
            task.cancel()


class RolloutScorer:
    """Generates and scores responses, and stores all responses for reuse in a resumed run."""

    def __init__(
        self,
        rollout: RolloutRole,
        reward: RewardRole,
        record: RunRecord,
        *,
        rewards_fingerprint: str,
        in_flight: bool = False,
    ) -> None:
        """Open the stores of a run. `in_flight`: the engines answer training requests at the same time."""
        self.rollout = rollout
        self.weights = 0, ""  # version and checksum of the engines' weights
        self.answers = partial(answers_in_flight, rollout) if in_flight else rollout.generate
        self.reward = reward
        self.record = record
        self.spool = record.folder.spool
        self.score_ledger = ScoreLedger(record.folder.spool, rewards=rewards_fingerprint)
        self.finish_order = FinishOrderLedger(record.folder.spool, rewards=rewards_fingerprint)

    async def score_all(
        self,
        requests: Sequence[GroupRequest],
        sampling: Sampling,
        *,
        step: int,
        version: int,
        split: str = "train",
        report: Callable[[ScoredGroup], None] = lambda _: None,
    ) -> list[ScoredGroup]:
        """Return the scored responses to all requests, in order. Each group is scored while later groups generate.

        `step` is of the metrics row, `version` of the sampling weights, and `split` is "train" or an evaluation set's
        name. `report` is called with each group right after scoring.
        """

        async def score(group: CompletedGroup, num_done: int) -> ScoredGroup:
            self.record.show("rollouts", num_done, len(requests))
            scored = await self.score(group, sampling, step=step, version=version, split=split)
            report(scored)
            return scored

        return await process_answers(self.answers(requests, sampling, version=version), requests, score)

    async def score_first_finished(
        self,
        requests: Sequence[GroupRequest],
        sampling: Sampling,
        is_enough: Callable[[ScoredGroup], bool],
        *,
        rule: str,
        step: int,
        version: int,
        report: Callable[[ScoredGroup], None],
    ) -> list[ScoredGroup]:
        """Return the scored groups that finished first, in the order of the requests, and cancel the rest.

        `is_enough` returns True for the last needed group, and `rule` names its criterion. A resumed run with the same
        requests and rule gets the same groups.
        """
        race = request_set_digest(requests, sampling, version=version, rule=rule)
        newest, checksum = self.weights
        stored = self.finish_order.get(race, weights=checksum if version == newest else None)
        if stored is not None:  # later weights cannot answer the cancelled requests
            requests = [request for request in requests if request.group_id in stored]
        finished: list[ScoredGroup] = []
        closing: asyncio.Task[Any] | None = None  # the task for the last needed group

        async def score(group: CompletedGroup) -> None:
            nonlocal closing
            scored = await self._score(group, sampling, version=version)
            if closing is not None:
                return
            note_errors(scored, self.record, step=step, split="train")
            finished.append(scored)
            report(scored)
            self.record.show("rollouts", len(finished), len(requests))
            if is_enough(scored) if stored is None else len(finished) == len(stored):
                closing = asyncio.current_task()
                ids = {scored.group.request.group_id for scored in finished}
                await self.rollout.cancel([request for request in requests if request.group_id not in ids])

        tasks: list[asyncio.Task[None]] = []
        try:
            async for group in self.rollout.generate(requests, sampling, version=version):
                if stored is None or group.request.group_id in stored:
                    tasks.append(asyncio.create_task(score(group)))
            pending: set[asyncio.Task[None]] = set(tasks)
            while closing is None and pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            if closing is not None:
                await closing
            for task in tasks:  # raise a failure even if the batch is complete without this group
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
        finished.sort(key=lambda scored: scored.group.request.group_id)
        if stored is None:
            self.finish_order.put(race, [scored.group.request.group_id for scored in finished], weights=checksum)
        return finished

    def forget_untrained(self) -> None:
        """Delete stored failures, and responses without a trained token, after such a failure has ended the run. The
        user corrects the reward or the agent, and the resumed run calls it again."""
        self.score_ledger.forget_failures()
        drop_untrained(self.spool)
        self.finish_order.clear()  # a new score may change the batch

    def retain_from(self, start: int, *, begun: Collection[int] = ()) -> None:
        """Delete the stored responses to evaluations and to groups before `start`. A checkpoint covers such responses.
        Responses to the cancelled requests `begun` stay. Files that an engine writes during this call stay too.
        """
        found = {*stored_groups(self.spool), *begun_groups(self.spool)}
        for path in found.difference(_files(self.spool, start=start, begun=begun)):
            path.unlink(missing_ok=True)
        self.score_ledger.retain_from(start)
        self.finish_order.retain_from(start)

    def save_to(self, folder: Path, *, start: int, begun: Collection[int] = ()) -> None:
        """Copy the stored responses from group `start` on, and to the cancelled requests `begun`, into a folder.

        Later weights cannot sample the same responses. All groups go into one file, since a disk takes about as long to
        sync a small file as a large one.
        """
        paths = sorted(_files(self.spool, start=start, begun=begun))

        def write(aside: Path) -> None:
            with tarfile.open(aside, "w") as archive:
                for path in paths:
                    archive.add(path, path.name)

        make_folder(folder, exist_ok=True)
        write_aside(folder / ARCHIVE, write)
        self.score_ledger.save_to(folder, start=start)
        self.finish_order.save_to(folder, start=start)

    def restore_from(self, folder: Path) -> None:
        """Add the responses that `save_to` wrote into a folder."""
        with tarfile.open(folder / ARCHIVE) as archive:
            for member in archive:
                write = partial(_extract, archive, member)
                write_aside(self.spool / Path(member.name).name, write, needed=member.size)
        self.score_ledger.restore_from(folder)
        self.finish_order.restore_from(folder)

    async def add_greedy_baseline(
        self, groups: Sequence[ScoredGroup], sampling: Sampling, *, step: int, version: int
    ) -> list[ScoredGroup]:
        """Return the groups with score and length of one greedy response to each prompt, by the same rewards.

        In flight, newer weights than the group's may sample the greedy response. A group without a scored greedy
        response carries that response's errors.
        """
        plain: Any = {"temperature": None, "continues": None}
        requests = [
            replace(request, group_id=request.group_id + GREEDY_GROUPS, seeds=request.seeds[:1], **plain)
            for request in (scored.group.request for scored in groups if not scored.scores.errors)
        ]
        greedy_sampling = replace(sampling, temperature=0.0, top_p=1.0, top_k=None, min_p=0.0)
        answers = await self.score_all(requests, greedy_sampling, step=step, version=version) if requests else []
        greedy = {scored.group.request.group_id - GREEDY_GROUPS: scored for scored in answers}
        return [_with_greedy(scored, greedy.get(scored.group.request.group_id)) for scored in groups]

    async def score(
        self, group: CompletedGroup, sampling: Sampling, *, step: int, version: int, split: str = "train"
    ) -> ScoredGroup:
        """Return the group with scores, and record the failures. `score_all` explains the arguments."""
        scored = await self._score(group, sampling, version=version)
        note_errors(scored, self.record, step=step, split=split)
        return scored

    async def _score(self, group: CompletedGroup, sampling: Sampling, *, version: int) -> ScoredGroup:
        group_id, request = group.request.group_id, scored_identity(group.request, sampling, group.infos)
        scores = self.score_ledger.get(group_id, version, request)
        if scores is None:
            try:
                scores = await self.reward.score(group)
            except ResultsLost:
                group = await self.rollout.restored(group, sampling)
                scores = await self.reward.score(group)
            self.score_ledger.put(group_id, version, request, scores)
        return ScoredGroup(group=group, scores=scores)

    async def restored(self, scored: Sequence[ScoredGroup], sampling: Sampling) -> list[ScoredGroup]:
        """Return scored groups with tokens from the run's store, in place of tokens lost with a node."""
        groups = await asyncio.gather(*(self.rollout.restored(one.group, sampling) for one in scored))
        return [replace(one, group=group) for one, group in zip(scored, groups, strict=True)]


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    stored = archive.extractfile(member)
    assert stored is not None, "the archive has only files"
    with stored, path.open("wb") as file:
        shutil.copyfileobj(stored, file)


def _files(folder: Path, *, start: int, begun: Collection[int]) -> list[Path]:
    """Return the files of whole groups from `start` on, and of the cancelled requests `begun`."""
    whole = [path for path, group_id in stored_groups(folder).items() if is_from(group_id, start)]
    return whole + [path for path, group_id in begun_groups(folder).items() if group_id in begun]


def _with_greedy(group: ScoredGroup, greedy: ScoredGroup | None) -> ScoredGroup:
    """Return the group with the score or the errors of the greedy response."""
    if greedy is None:
        return group
    if greedy.scores.errors:
        return replace(group, scores=greedy.scores)
    tokens = greedy.group.infos[0].num_response_tokens
    return replace(group, greedy_score=greedy.scores.scores[0], greedy_tokens=tokens)
