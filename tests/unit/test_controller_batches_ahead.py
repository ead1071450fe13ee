"""A resumed run collects batches ahead through queue and collector, from engines that store all samples."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.batch_queue import BatchQueue
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.ledgers import request_identity
from rlhf.tracking.display.progress import Progress
from rlhf.types import GroupRequest, Sampling
from tests.fakes.collecting import OrderedEngines, Run, by_prompt, slowest

Store = dict[tuple[int, int], dict[str, str]]  # requests by group and version


class StoringEngines(OrderedEngines):
    """Engines that answer requests for an earlier version from the store alone."""

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


def begin(folder: Path, store: Store, *, version: int, settings: str = "same", **keys: Any) -> tuple[Run, BatchQueue]:
    run = Run(folder, keys.pop("scores", lambda _: (0.0, 1.0)), prompts=100, **keys)
    run.engines = StoringEngines(run.engines.by, store, version)
    roles: tuple[Any, Any] = (run.engines, run)
    run.scorer = run.collector.scorer = RolloutScorer(*roles, run.scorer.record, rewards_fingerprint="f")
    record: Any = SimpleNamespace(
        apart=lambda *_, **__: nullcontext(), stage=lambda _: nullcontext(), progress=Progress(9)
    )
    return run, BatchQueue(run.collector, record, max_staleness=1, num_steps=9, settings=settings)


async def train(run: Run, ahead: BatchQueue, steps: range) -> list[list[int]]:
    """Return the prompts of each step's batch."""
    batches = []
    for step in steps:
        ahead.request(step)
        groups = (await ahead.take(step)).collected.groups
        batches.append([scored.group.request.prompt.prompt_id for scored in groups])
        await ahead.until_weights_may_change()
        await ahead.synced(step)
        cast(StoringEngines, run.engines).version = step
    return batches


async def checkpoint_of_step_2(folder: Path, store: Store, **keys: Any) -> tuple[dict[str, Any], list[list[int]]]:
    """Return a checkpoint's state, and the batches of later steps. Batch 3 is whole, by version 1."""
    run, ahead = begin(folder, store, version=0, **keys)
    await train(run, ahead, range(1, 3))
    state = json.loads(json.dumps(ahead.state()))
    later = await train(run, ahead, range(3, 6))
    for group, version in [key for key in store if key[1] >= 2]:
        del store[group, version]
    return state, later


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="plain"),
        pytest.param({"oversample": 1.5, "order": slowest(1, 3, 9, 11, 12)}, id="oversample"),
        pytest.param({"dynamic_sampling": {}, "scores": by_prompt(solved=[9])}, id="dynamic sampling"),
    ],
)
async def test_a_resumed_run_trains_the_same_batches(tmp_path: Path, keys: dict[str, Any]) -> None:
    store: Store = {}
    state, later = await checkpoint_of_step_2(tmp_path, store, **keys)
    again, resumed = begin(tmp_path, store, version=2, **keys)
    resumed.restore(state)
    assert await train(again, resumed, range(3, 6)) == later


async def test_after_a_change_of_settings_nothing_is_taken_from_the_store(tmp_path: Path) -> None:
    store: Store = {}
    state, _ = await checkpoint_of_step_2(tmp_path, store)
    again, resumed = begin(tmp_path, store, version=2, settings="another temperature")
    again.collector.sampling = Sampling(max_new_tokens=4, temperature=0.5)
    resumed.restore(state)
    assert len(await train(again, resumed, range(3, 6))) == 3
