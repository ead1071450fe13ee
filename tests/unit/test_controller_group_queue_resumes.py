"""With random times, outcomes and resumes, each prompt in flight is trained once, and no lag exceeds the bound."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf.data.stream import given_rows
from rlhf.roles import CompletedGroup
from rlhf.tracking.run_folder.group_ledger import StepGroups
from rlhf.types import GroupRequest, Sampling
from tests.fakes.collecting import SOLVED, VARIED
from tests.fakes.in_flight import HeldEngines, InFlight

STEPS = 12


class ByGroup(HeldEngines):
    """Engines that hold each request until the test finishes it. A prompt of two epochs may be in flight twice."""

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
