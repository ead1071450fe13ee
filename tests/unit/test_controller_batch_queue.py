"""Batches ahead of training have the right order, versions and positions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.collect import Collected
from rlhf.controller.record import RunRecord
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.ledgers import request_identity
from rlhf.tracking.display.progress import Progress
from rlhf.types import GroupRequest, Sampling
from tests.fakes.collecting import OrderedEngines, Run, by_prompt, slowest


class Batches:
    """A collector. The position is the number of collected batches."""

    def __init__(self) -> None:
        self.collected: list[tuple[int, int]] = []  # step and version
        self.fails_at: int | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def collect(self, step: int, *, version: int) -> Any:
        await self.may_go_on.wait()
        if step == self.fails_at:
            raise RunError("an engine died")
        self.collected.append((step, version))
        return step

    def state(self) -> dict[str, Any]:
        return {"next_group": len(self.collected)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.collected = [(0, 0)] * state["next_group"]


def queue(batches: Any, *, max_staleness: int = 1, num_steps: int = 9, settings: str = "same") -> BatchQueue:
    record = SimpleNamespace(
        apart=lambda *_, **__: nullcontext(), stage=lambda _: nullcontext(), progress=Progress(num_steps)
    )
    bounds: Any = {"max_staleness": max_staleness, "num_steps": num_steps}
    return BatchQueue(batches, cast(RunRecord, record), settings=settings, **bounds)


async def train(ahead: BatchQueue, *, first: int, last: int, trained: Any = lambda step: None) -> list[Any]:
    """Return what is collected for each step."""
    batches = []
    for step in range(first, last + 1):
        ahead.request(step)
        batches.append((await ahead.take(step)).collected)
        await ahead.until_weights_may_change()
        await ahead.synced(step)
        trained(step)
    return batches


@pytest.mark.parametrize(
    ("max_staleness", "versions"),
    [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2]), (9, [0, 0, 0, 0, 0])],
)
async def test_batches_are_sampled_by_the_newest_weights_within_the_bound(
    max_staleness: int, versions: list[int]
) -> None:
    batches = Batches()
    ahead = queue(batches, max_staleness=max_staleness, num_steps=5)
    assert await train(ahead, first=1, last=5) == [1, 2, 3, 4, 5]
    assert batches.collected == list(zip(range(1, 6), versions, strict=True))


async def test_the_next_batch_is_collected_while_a_step_is_trained() -> None:
    batches = Batches()
    ahead = queue(batches, max_staleness=1)
    await train(ahead, first=1, last=1)
    batches.may_go_on.clear()
    ahead.request(2)
    await ahead.take(2)  # collected before; the engines work on batch 3 from here on
    assert batches.collected == [(1, 0), (2, 0)]
    batches.may_go_on.set()
    await ahead.until_weights_may_change()
    assert batches.collected == [(1, 0), (2, 0), (3, 1)]


async def test_a_smaller_bound_after_a_resume_samples_the_older_batches_again() -> None:
    first = queue(Batches(), max_staleness=2, num_steps=5)
    await train(first, first=1, last=2)
    assert first.state() == {"next_group": 2, "ahead": [(3, 0), (4, 1)], "settings": "same"}
    batches = Batches()
    again = queue(batches, max_staleness=1, num_steps=5)
    again.restore(first.state())
    await train(again, first=3, last=5)
    assert batches.collected[2:] == [(3, 2), (4, 2), (5, 3)]  # (3, 0) lags by two


async def test_a_failure_of_the_engines_ends_the_step_that_waits_or_the_step_before() -> None:
    batches = Batches()
    batches.fails_at = 2
    ahead = queue(batches, max_staleness=1)
    ahead.request(1)
    await ahead.take(1)
    with pytest.raises(RunError, match="an engine died"):
        await ahead.until_weights_may_change()
    turns = queue(batches, max_staleness=0)
    turns.request(2)
    with pytest.raises(RunError, match="an engine died"):
        await turns.take(2)


async def test_a_failure_of_the_engines_cancels_the_training_meanwhile() -> None:
    batches = Batches()
    ahead = queue(batches, max_staleness=1)
    await train(ahead, first=1, last=1)
    batches.fails_at = 3
    batches.may_go_on.clear()
    ahead.request(2)
    await ahead.take(2)
    cancelled = asyncio.Event()

    async def learn() -> None:
        batches.may_go_on.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with asyncio.timeout(5):
        with pytest.raises(RunError, match="an engine died"):
            await ahead.during(learn())
    assert cancelled.is_set()


async def test_training_is_shown_while_a_batch_is_collected_ahead() -> None:
    """The awaited batch is shown; a later batch only counts once whole."""
    batches, unused = Batches(), cast(Any, None)
    progress = Progress(5)
    record = RunRecord(folder=unused, tracker=unused, timeline=unused, progress=progress)
    ahead = queue(batches, max_staleness=1)
    ahead.record = cast(RunRecord, SimpleNamespace(apart=record.apart, stage=nullcontext, progress=progress))
    shown: list[tuple[int, str, int]] = []

    async def collect(step: int, *, version: int) -> int:
        record.show(f"rollouts of step {step}")
        shown.append((step, progress._stage, progress._ahead))
        return step

    batches.collect = collect  # type: ignore[method-assign]
    ahead.request(1)
    await ahead.take(1)
    record.show("update")
    await ahead.until_weights_may_change()
    assert shown == [(1, "rollouts of step 1", 0), (2, "rollouts of step 1", 0)]
    assert (progress._stage, progress._ahead) == ("update", 1)
    ahead.request(2)
    assert progress._ahead == 0
    await ahead.stop()


async def test_a_stopped_queue_is_where_it_was_before_the_batch() -> None:
    batches = Batches()
    batches.may_go_on.clear()
    ahead = queue(batches, max_staleness=0)
    ahead.request(1)
    waiting = asyncio.create_task(ahead.take(1))
    await asyncio.sleep(0)
    waiting.cancel()
    await ahead.stop()
    assert ahead.state() == {"next_group": 0, "ahead": [(1, 0)], "settings": "same"}


Store = dict[tuple[int, int], dict[str, str]]  # requests by group and version


class StoringEngines(OrderedEngines):
    """Engines that answer requests for an earlier version only from the store."""

    def __init__(self, order: Any, store: Store, version: int) -> None:
        super().__init__(order)
        self.store, self.version = store, version

    async def generate(
        self, requests: Sequence[GroupRequest], sampling: Sampling, *, version: int
    ) -> AsyncIterator[CompletedGroup]:
        lost = [r for r in requests if self.store.get((r.group_id, version)) != request_identity(r, sampling)]
        if version != self.version and lost:
            raise RunError(f"{len(lost)} groups of version {version} are not stored")
        async for group in super().generate(requests, sampling, version=version):
            self.store[group.request.group_id, version] = request_identity(group.request, sampling)
            yield group


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"oversample": 1.5, "order": slowest(1, 3, 9, 11, 12)},
        {"dynamic_sampling": {}, "scores": by_prompt(solved=[9])},
    ],
    ids=["plain", "oversample", "dynamic sampling"],
)
async def test_a_resumed_run_trains_the_same_batches_unless_settings_have_changed(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    """The checkpoint is of step 2. Batch 3 is whole, by version 1, and later weights are abandoned."""
    store: Store = {}

    def start(version: int, settings: str = "same") -> tuple[Run, BatchQueue, Any]:
        run = Run(tmp_path, prompts=100, **keys)
        run.scorer.rollout = engines = StoringEngines(run.engines.by, store, version)
        run.scorer.answers = engines.generate
        return run, queue(run.collector, settings=settings), partial(setattr, engines, "version")

    def prompts(batches: list[Collected]) -> list[list[int]]:
        return [[scored.group.request.prompt.prompt_id for scored in batch.groups] for batch in batches]

    _, ahead, trained = start(0)
    await train(ahead, first=1, last=2, trained=trained)
    state = json.loads(json.dumps(ahead.state()))
    later = prompts(await train(ahead, first=3, last=5, trained=trained))
    for group, version in [key for key in store if key[1] >= 2]:
        del store[group, version]
    _, resumed, trained = start(2)
    resumed.restore(state)
    assert prompts(await train(resumed, first=3, last=5, trained=trained)) == later
    run, changed, trained = start(2, settings="another temperature")
    run.collector.sampling = Sampling(max_new_tokens=4, temperature=0.5)
    changed.restore(state)
    assert len(await train(changed, first=3, last=5, trained=trained)) == 3, "nothing is taken from the store"
