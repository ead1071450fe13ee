"""Collect batches ahead of training, in order and within a bound.

The batch of step s is trained by version s - 1 of the weights and sampled by an earlier version, at most
`max_staleness` versions before. With max_staleness 0, rollouts and training take turns. Above 0, the engines sample the
batch of step s + max_staleness while step s is trained. The sampling and the training step end before the weights are
synced. So an engine step sees a single batch and version, and a run repeats bit for bit.

After step s the batches of the next `max_staleness` steps are whole. Later weights would sample other responses, so a
checkpoint holds the responses of these batches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.controller.collect import Collector
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_queue import Batch, unless_failed
from rlhf.roles import Metrics
from rlhf.types import GroupRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requested:
    version: int
    position: Mapping[str, Any]  # position of the collector before the batch
    batch: asyncio.Future[Batch]


class BatchQueue:
    """The requested batches before training."""

    def __init__(
        self, collector: Collector, record: RunRecord, *, max_staleness: int, num_steps: int, settings: str
    ) -> None:
        """Create an empty queue. `settings`: digest of the settings that decide the groups of a batch."""
        self.collector = collector
        self.record = record
        self.max_staleness = max_staleness
        self.num_steps = num_steps
        self.settings = settings
        self._requested: dict[int, _Requested] = {}  # by step
        self._versions: dict[int, int] = {}  # of a resumed run: version that sampled each stored batch
        self._collecting: asyncio.Task[None] | None = None
        self.seconds: float | None = None  # duration of collecting since the last `request`; None: nothing was left

    def request(self, step: int) -> None:
        """Begin to collect the batch of a step and the later batches within the bound, unless they are requested."""
        last = min(step + self.max_staleness, self.num_steps)
        steps = [number for number in range(step, last + 1) if number not in self._requested]
        self.seconds = None
        self._show_ahead(step)
        if steps:
            self._collecting = asyncio.create_task(self._collect(steps, version=step - 1))

    async def _collect(self, steps: list[int], *, version: int) -> None:
        began = time.perf_counter()
        for step in steps:
            stored = self._versions.pop(step, version)
            if step - 1 - stored > self.max_staleness:  # the bound was larger before the run was resumed
                self._versions.clear()
                stored = version
            batch: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()
            self._requested[step] = _Requested(version=stored, position=self.collector.state(), batch=batch)
            metrics: list[Metrics] = []
            with self.record.apart(metrics, is_shown=step == version + 1), self.record.stage("rollouts"):
                collected = await self.collector.collect(step, version=stored)
            batch.set_result(Batch(collected=collected, metrics=metrics))
            self._show_ahead(version + 1)
        self.seconds = time.perf_counter() - began

    def _show_ahead(self, step: int) -> None:
        later = [entry.batch for number, entry in self._requested.items() if number > step]
        self.record.progress.ahead(sum(batch.done() for batch in later))

    async def take(self, step: int) -> Batch:
        assert self._collecting is not None
        await asyncio.sleep(0)  # let the collecting task begin
        batch = self._requested[step].batch
        either: set[asyncio.Future[Any]] = {batch, self._collecting}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not batch.done():
            await self._collecting
        return batch.result()

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._collecting is not None
        return await unless_failed(work, self._collecting)

    async def until_weights_may_change(self) -> None:
        """Wait until all requested batches are whole."""
        assert self._collecting is not None
        await asyncio.shield(self._collecting)  # a caller that gives up this wait may wait again

    async def synced(self, version: int) -> None:
        self._requested.pop(version, None)

    async def stop(self) -> Sequence[GroupRequest]:
        """Give up incomplete batches. No request is left in the engines after a whole step."""
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.gather(self._collecting, return_exceptions=True)
        return ()

    @property
    def position(self) -> Mapping[str, Any]:
        """Return the collector's state before the first untrained batch."""
        first = next(iter(self._requested.values()), None)
        return self.collector.state() if first is None else first.position

    def state(self) -> dict[str, Any]:
        ahead = [(step, entry.version) for step, entry in self._requested.items()]
        return {**self.position, "ahead": ahead, "settings": self.settings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the position in the prompts. The batches of the checkpoint are then collected from the store. After a
        change of the settings, the newest weights sample the batches again."""
        self.collector.restore(state)
        if state["settings"] == self.settings:
            self._versions = dict(state["ahead"])
        elif state["ahead"]:
            logger.warning(
                "the settings of rollouts or rewards have changed: %d batches ahead are sampled again",
                len(state["ahead"]),
            )
