"""Groups in flight: the bound, the order of batches, the lag of old groups, and exactly-once after a resume.

The last test has random times, outcomes and resumes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.carried import first_untrained_group
from rlhf.controller.learning import ColumnsByGroup
from rlhf.controller.online import OnlineController
from rlhf.data.stream import given_rows
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup, RemoteColumns, ScoredGroup
from rlhf.rollouts.records.spool import group_path, stored_groups
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.run_folder.group_ledger import StepGroups
from rlhf.types import GroupRequest, Sampling, TokenValues
from tests.fakes.calls import settle
from tests.fakes.collecting import SOLVED, VARIED, Run, by_prompt
from tests.fakes.in_flight import HeldEngines, InFlight

PROMPTS = 4  # of a step


async def test_no_more_groups_are_outstanding_than_the_bound_allows_and_the_last_steps_train(tmp_path: Path) -> None:
    run = InFlight(tmp_path, max_staleness=2, num_steps=4)
    run.queue._taken_at -= 1000.0  # as if the roles had taken long to start
    await run.begin()
    assert run.engines.asked == list(range(3 * PROMPTS))
    assert results(merge_metrics((await run.step(1)).metrics))["time/rollouts_s"] < 1000.0
    assert run.engines.asked == list(range(4 * PROMPTS))
    for step in (2, 3, 4):
        await run.step(step)
    assert run.engines.asked == run.trained == list(range(4 * PROMPTS))
    assert run.queue.seconds is None, "nothing was left to request"


async def test_the_order_of_prompts_waits_for_a_slow_response_and_that_of_completion_does_not(tmp_path: Path) -> None:
    run = InFlight(tmp_path / "prompt", max_staleness=1)
    run.engines.slow = {1}
    await run.begin()
    waiting = asyncio.create_task(run.step(1))
    await settle()
    assert not waiting.done()
    run.engines.finish(1)
    await waiting
    assert run.trained == [0, 1, 2, 3]
    run = InFlight(tmp_path / "completion", max_staleness=1, batch_order="completion")
    run.engines.slow = {1}
    await run.begin()
    await run.step(1)
    assert run.trained == [0, 2, 3, 4]


async def test_a_group_that_would_lag_too_much_is_requested_again(tmp_path: Path) -> None:
    run = InFlight(tmp_path, max_staleness=1, batch_order="completion")
    run.engines.slow = {1}
    await run.begin()
    batches = [await run.step(step) for step in (1, 2)]
    assert run.engines.asked.count(1) == 2, "version 2 is two versions after its request"
    counts = [results(merge_metrics(batch.metrics))["rollouts/reasked_groups/total"] for batch in batches]
    run.engines.finish(1)
    await settle()
    counts.append(results(merge_metrics((await run.step(3)).metrics))["rollouts/reasked_groups/total"])
    await run.step(4)
    assert counts == [0, 0, 1]
    assert max(run.lags) == 1
    assert sorted(run.trained) == list(range(16))


async def test_a_finished_group_that_waited_too_long_is_requested_again(tmp_path: Path) -> None:
    run = InFlight(tmp_path, max_staleness=1)
    run.engines.slow = {0}
    await run.begin()
    run.queue.prompts_per_step = 2  # the window shrinks, as after a resume with another bound
    run.engines.finish(0)
    await settle()
    for step in (1, 2, 3):
        await run.step(step)
    assert max(run.lags) == 1
    assert run.trained == [0, 1, 2, 3, 4, 5]
    assert run.engines.asked.count(4) == 2


async def test_the_columns_of_a_group_that_is_requested_again_are_forgotten(tmp_path: Path) -> None:
    """The group may be dropped before any step forgets the columns."""
    broken: set[int] = set()
    run = InFlight(tmp_path, scores=lambda prompt: None if prompt in broken else VARIED)
    columns, kept = ColumnsByGroup(), dict[int, ScoredGroup]()

    async def none() -> list[RemoteColumns[TokenValues]]:
        return []

    async def anew(left: Sequence[ScoredGroup]) -> Any:
        return ["anew"] * len(left)

    def arrived(scored: ScoredGroup) -> None:
        kept[scored.group.request.group_id] = scored
        columns.begin(scored, none())

    run.run.collector.arrived, run.run.collector.outdated = arrived, columns.forget
    await run.begin()
    run.queue.prompts_per_step = 2  # the window shrinks, as after a resume with another bound
    await run.step(1)
    assert await columns.take([kept[4]], anew) == []
    broken.add(4)
    await run.step(2)
    assert run.engines.asked.count(4) == 2
    assert await columns.take([kept[4]], anew) == ["anew"]


async def test_responses_without_a_token_have_no_lag(tmp_path: Path) -> None:
    """The environment failed before the first turn. The group is dropped, not requested for ever."""
    run = InFlight(tmp_path, scores=by_prompt(broken=[8]))
    run.engines.slow = {8}
    await run.begin()
    await run.step(1)
    await run.step(2)
    run.engines.slow = set()
    run.engines.finish(8, tokens=0)
    batch = await run.step(3)
    assert run.engines.asked.count(8) == 1
    assert [record.prompt_id for record in batch.collected.ended.dropped] == [8]
    assert [record.oldest for record in batch.collected.ended.dropped] == [None]


async def test_the_filter_of_the_first_groups_counts_all_that_are_kept(tmp_path: Path) -> None:
    """During a slow response, groups of later batches are filtered too: as many of each batch as in turns."""
    solved = [prompt for prompt in range(40) if prompt % 4 in (1, 2)]
    run = InFlight(
        tmp_path, max_staleness=2, dynamic_sampling={"max_filtered_fraction": 1.5}, scores=by_prompt(solved=solved)
    )
    run.engines.slow = {0}
    await run.begin()
    run.engines.finish(0)
    await run.step(1)
    assert run.trained == [0, 3, 4, 7]


async def test_groups_without_a_signal_are_replaced_and_counted(tmp_path: Path) -> None:
    run = InFlight(tmp_path, dynamic_sampling={}, scores=by_prompt(solved=[1, 2], broken=[5]))
    await run.begin()
    rows = [results(merge_metrics((await run.step(step)).metrics)) for step in (1, 2)]
    assert run.trained == [0, 3, 4, 6, 7, 8, 9, 10]
    assert sum(row["rollouts/dropped_groups/total"] for row in rows) == 1
    assert rows[0]["rollouts/filtered_groups/fraction"] == 2 / 6


async def test_no_group_begins_with_old_weights_in_place_of_a_trained_one(tmp_path: Path) -> None:
    """A group with old weights would exceed the bound in training, and be sampled again."""
    run = InFlight(tmp_path, dynamic_sampling={}, scores=by_prompt(solved=[7]))
    run.engines.slow = {7}
    await run.begin()
    run.queue.request(1)
    await run.queue.take(1)
    await run.queue.until_weights_may_change()
    run.engines.finish(7)  # the group is filtered during a weight sync
    await settle()
    assert run.engines.asked == list(range(9))
    await run.begin(1)
    assert run.engines.asked == list(range(13))


async def test_a_resumed_run_requests_the_outstanding_groups_again(tmp_path: Path) -> None:
    first = InFlight(tmp_path, max_staleness=2, batch_order="completion")
    first.engines.slow = {1, 6}
    await first.begin()
    await first.step(1)
    state = json.loads(json.dumps(first.queue.state()))
    resumed = InFlight(tmp_path, max_staleness=2, batch_order="completion")
    resumed.queue.restore(state)
    assert first_untrained_group(resumed.queue.state()) == 1
    await resumed.begin(1)
    requested = {request.group_id: request for request, _, _ in resumed.engines.running.values()}
    assert not requested
    outstanding = [1, *range(5, 16)]
    assert resumed.engines.asked == outstanding
    again = {entry.group_id: entry.request for entry in resumed.queue._outstanding.values()}
    before = {entry.group_id: entry.request for entry in first.queue._outstanding.values()}
    assert again == before, "ids, seeds and places are those of the killed run"
    for step in (2, 3):
        await resumed.step(step)
    assert sorted(first.trained + resumed.trained) == list(range(12))


async def test_a_resumed_run_counts_each_dropped_group_once(tmp_path: Path) -> None:
    """Groups dropped after the last batch are requested again."""
    keys: dict[str, Any] = {"max_dropped_fraction": 8 / 32, "scores": by_prompt(broken=range(8, 13))}
    first = InFlight(tmp_path, **keys)
    await first.begin()
    await first.step(1)
    resumed = InFlight(tmp_path, **keys)
    resumed.queue.restore(json.loads(json.dumps(first.queue.state())))
    await resumed.begin(1)
    for step in (2, 3):
        await resumed.step(step)
    assert resumed.trained == [4, 5, 6, 7, 13, 14, 15, 16]


async def test_the_failure_of_a_group_ends_the_wait_and_cancels_the_training_meanwhile(tmp_path: Path) -> None:
    run = InFlight(tmp_path)
    run.engines.error = RunError("rollout engine 0 died")
    await run.begin()
    with pytest.raises(RunError, match="engine 0 died"):
        await run.step(1)
    await run.queue.stop()
    run = InFlight(tmp_path)
    run.engines.slow = {0}
    await run.begin()
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def learn() -> None:
        run.engines.running[0][2].set_exception(RunError("rollout engine 0 died"))
        await waiting

    async with asyncio.timeout(5):
        with pytest.raises(RunError, match="engine 0 died"):
            await run.queue.during(learn())
    assert waiting.cancelled()


async def test_a_stopped_queue_requests_its_groups_again_and_waits_for_finished_ones_too(tmp_path: Path) -> None:
    """Otherwise a second answer comes after the group's training, and the group may count as dropped."""
    run = InFlight(tmp_path)
    run.engines.slow = {2}
    await run.begin()
    assert [request.group_id for request in await run.queue.stop()] == [2], "only this one is still in the engines"
    run.engines.slow = {1}
    await run.begin()
    waiting = asyncio.create_task(run.step(1))
    await settle()
    assert not waiting.done()
    run.engines.finish(1)
    await waiting
    assert run.trained == [0, 1, 2, 3]


@pytest.mark.parametrize(("state", "used"), [({"outstanding": []}, [2, 3]), ({}, [])])
async def test_a_resumed_run_uses_no_stored_group_of_abandoned_weights(
    tmp_path: Path, state: dict[str, Any], used: list[int]
) -> None:
    """A run in turns may leave groups of abandoned weights, whose versions the new weights then use again."""
    for version in (2, 3, 4):
        group_path(tmp_path, 8, version).write_bytes(b"")
    done: list[Any] = []

    async def restored(*_: Any) -> None:
        done.append("learning")

    controller: Any = SimpleNamespace(
        record=SimpleNamespace(folder=SimpleNamespace(spool=tmp_path, checkpoint=lambda _: tmp_path / "step_000003")),
        step=3,
        in_flight=True,
        batches=SimpleNamespace(restore=done.append),
        learning=SimpleNamespace(restore=restored),
    )
    await OnlineController.restore_position(controller, state)
    assert sorted(stored_groups(tmp_path)) == [group_path(tmp_path, 8, version) for version in used]
    assert done == [state, "learning"]


async def test_turns_continue_a_run_that_was_in_flight(tmp_path: Path) -> None:
    run = InFlight(tmp_path)
    await run.begin()
    await run.step(1)
    state = json.loads(json.dumps(run.queue.state()))
    turns = Run(tmp_path, prompts=100)
    batches = BatchQueue(turns.collector, turns.record, max_staleness=0, num_steps=9, settings="same")
    batches.restore(state)
    assert [prompt.prompt_id for _, prompt in turns.collector.next(10)] == list(range(4, 14))


STEPS = 12


class ByGroup(HeldEngines):
    """Engines hold each request until the test finishes the request. A prompt of two epochs may be in flight twice."""

    async def answer(
        self, request: GroupRequest, sampling: Sampling, *, oldest: int, urgent: bool = False
    ) -> CompletedGroup | None:
        future: asyncio.Future[CompletedGroup | None] = asyncio.get_running_loop().create_future()
        self.running[request.group_id] = (request, self.version, future)
        return await future

    async def cancel(self, requests: Sequence[GroupRequest]) -> None:
        for request in requests:
            if request.group_id in self.running:
                self.running.pop(request.group_id)[2].set_result(None)


def start(folder: Path, random: Random, seed: int) -> InFlight:
    """Return a start of the run, with 17 prompts, fewer than the bound of outstanding groups."""

    def scores(prompt: int) -> Sequence[float] | None:
        outcome = Random(f"{seed}/{prompt}").random()
        return None if outcome < 0.1 else SOLVED if outcome < 0.35 else VARIED

    curriculum: dict[str, Any] = {"curriculum": {"outside": 0.3}} if random.random() < 0.5 else {}
    run = InFlight(
        folder,
        max_staleness=random.randint(1, 4),
        num_steps=STEPS,
        prompts=17,
        prompts_per_step=random.choice([1, 2, 4]),
        batch_order=random.choice(["prompt", "completion"]),
        dynamic_sampling={"max_filtered_fraction": 100.0},
        scores=scores,
        **curriculum,
    )
    run.engines = ByGroup()
    run.run.collector.scorer.rollout = run.engines
    return run


async def finish_some(run: InFlight, random: Random, count: int) -> None:
    for _ in range(count):
        if run.engines.running:
            run.engines.finish(random.choice(sorted(run.engines.running)))
        for _ in range(8):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(6))
async def test_each_prompt_ends_once_within_the_bound_of_its_start(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    states: dict[int, str] = {}  # checkpoints, by step
    ledger: dict[int, StepGroups] = {}
    for number in range(4):
        run = start(tmp_path / str(number), random, seed)
        done = 0
        if states:
            done = random.choice(sorted(states)[:-1] or [1])
            run.queue.restore(json.loads(states[done]))
            states = {step: states[step] for step in states if step <= done}
            ledger = {step: ledger[step] for step in ledger if step <= done}
        await run.begin(done)
        for step in range(done + 1, random.randint(done + 1, STEPS) + 1):
            run.queue.request(step)
            taking = asyncio.create_task(run.queue.take(step))
            while not taking.done():
                await finish_some(run, random, 1)
            batch = (await taking).collected
            ids = [info.sequence_id for scored in batch.groups for info in scored.group.infos]
            assert len(set(ids)) == len(ids)
            lags = [step - 1 - record.oldest for record in batch.ended.trained if record.oldest is not None]
            assert 0 <= min(lags) <= max(lags) <= run.queue.max_staleness
            await run.queue.until_weights_may_change()
            await finish_some(run, random, random.randint(0, 3))
            await run.begin(step)
            state = run.queue.state()
            ledger[step], states[step] = batch.ended, json.dumps(state)
            records = [r for ended in ledger.values() for r in (*ended.trained, *ended.filtered, *ended.dropped)]
            assert len({record.group_id for record in records}) == len(records)
            ends = [(record.epoch, record.prompt_id) for record in records]
            skipped = [prompt for ended in ledger.values() for prompt in ended.skipped]
            assert sorted([*ends, *skipped, *state["waiting"], *state["skipped"]]) == sorted(
                given_rows(state["stream"])
            )
        await run.queue.stop()
