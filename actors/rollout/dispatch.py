"""Choose the engine of each group by load, and let groups wait here while all engines are full.

The load of an engine is its outstanding work in tokens: a group counts the prompt once and the expected tokens of the
responses. An engine that becomes free takes waiting work, so a wrong expectation costs little.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.cluster.waiting import running_s

RECENT_RESPONSES = 1000  # window of the mean response length


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapacity:
    """The number of requests and tokens that an engine can hold at once."""

    cache_tokens: int  # tokens whose keys and values fit into the cache
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWork:
    """The size of a group, as known before its responses exist."""

    prompt_tokens: int
    samples: int
    limit: int  # most tokens of a response

    def tokens(self, expected: float = float("inf")) -> float:
        """Return the tokens of the group, for an expected response length. The samples share their prompt."""
        return self.prompt_tokens + self.samples * min(self.limit, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The room that a group takes in an engine."""

    engine: int
    tokens: float
    samples: int


@dataclass(slots=True, eq=False, kw_only=True)
class _Waiting:
    work: GroupWork
    slot: asyncio.Future[Slot | None]  # None: the group is dropped


@dataclass(slots=True, kw_only=True)
class _Load:
    """The outstanding work of one engine."""

    capacity: EngineCapacity
    tokens: float = 0.0
    samples: int = 0
    progress_at: float = 0.0  # when the engine last finished a group, or got its first group
    is_open: bool = True

    def has_room(self, tokens: float, samples: int) -> bool:  # an idle engine takes any group
        capacity = self.capacity
        fits = self.tokens + tokens <= capacity.cache_tokens and self.samples + samples <= capacity.samples
        return self.is_open and (fits or self.samples == 0)


class Dispatch:
    """The engines' outstanding work, and the waiting groups."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}  # by engine
        self._queues = deque[_Waiting](), deque[_Waiting]()  # ordinary and urgent groups, in order of arrival
        self._waiting: dict[int, _Waiting] = {}  # by group id
        self._mean_length = float("inf")  # mean length of recent responses; infinite before the first response
        self._num_lengths = 0
        self._failure: BaseException | None = None

    async def enter(self, group_id: int, work: GroupWork, *, urgent: bool) -> Slot | None:
        """Wait for room in an engine and take the room. None: the group was dropped.

        Urgent groups come before all ordinary groups, each in order of arrival. Raise the failure given to `fail`.
        """
        if self._failure is not None:
            raise self._failure
        engine = self._emptiest(work) if self._first(urgent=urgent) is None else None
        if engine is not None:
            return self._take(engine, work)
        waiting = _Waiting(work=work, slot=asyncio.get_running_loop().create_future())
        self._queues[urgent].append(waiting)
        self._waiting[group_id] = waiting
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            got = waiting.slot.done() and not waiting.slot.cancelled() and waiting.slot.exception() is None
            if got and (slot := waiting.slot.result()) is not None:
                self.leave(slot)
            raise
        finally:
            self._waiting.pop(group_id, None)

    def leave(self, slot: Slot, lengths: Iterable[int] = ()) -> None:
        """Give the room of a group back, and start waiting groups there. `lengths`: tokens of the group's responses."""
        for length in lengths:
            self._num_lengths = min(self._num_lengths + 1, RECENT_RESPONSES)
            previous = self._mean_length if self._num_lengths > 1 else float(length)
            self._mean_length = previous + (length - previous) / self._num_lengths
        load = self._loads[slot.engine]
        load.tokens -= slot.tokens
        load.samples -= slot.samples
        load.progress_at = running_s()
        self._fill(slot.engine)

    def close(self, engine: int) -> None:
        """Give no more groups to an engine."""
        if engine in self._loads:
            self._loads[engine].is_open = False

    def open(self, engine: int, capacity: EngineCapacity) -> None:
        """Give groups to a new or closed engine."""
        load = self._loads.setdefault(engine, _Load(capacity=capacity))
        load.capacity, load.is_open = capacity, True
        self._fill(engine)

    def fail(self, failure: BaseException) -> None:
        """Raise a failure in all present and future groups: an engine is lost for good."""
        self._failure = failure
        for waiting in self._waiting.values():
            if not waiting.slot.done():
                waiting.slot.set_exception(failure)

    def _fill(self, engine: int) -> None:
        """Start waiting groups in the room of an engine."""
        load = self._loads[engine]
        while (waiting := self._first()) is not None:
            if not load.has_room(waiting.work.tokens(self._mean_length), waiting.work.samples):
                return
            waiting.slot.set_result(self._take(engine, waiting.work))

    def _first(self, *, urgent: bool = False) -> _Waiting | None:
        """Return the first group that still waits, only among urgent groups if `urgent`."""
        for queue in self._queues[1:] if urgent else self._queues[::-1]:
            while queue and queue[0].slot.done():
                queue.popleft()
            if queue:
                return queue[0]
        return None

    def drop(self, group_id: int) -> None:
        """End the wait of a group. Has no effect if the group does not wait."""
        waiting = self._waiting.get(group_id)
        if waiting is not None and not waiting.slot.done():
            waiting.slot.set_result(None)

    def quiet_s(self, engine: int) -> float:
        """Return the seconds since the engine last finished a group. Before the first group: since the engine began to
        work."""
        return running_s() - self._loads[engine].progress_at

    def _emptiest(self, work: GroupWork) -> int | None:
        """Return the engine with the least outstanding work among the engines with room for a group."""
        tokens = work.tokens(self._mean_length)
        free = [index for index, load in sorted(self._loads.items()) if load.has_room(tokens, work.samples)]
        return min(free, key=lambda index: self._loads[index].tokens, default=None)

    def _take(self, engine: int, work: GroupWork) -> Slot:
        slot = Slot(engine=engine, tokens=work.tokens(self._mean_length), samples=work.samples)
        load = self._loads[engine]
        if load.samples == 0:
            load.progress_at = running_s()
        load.tokens += slot.tokens
        load.samples += slot.samples
        return slot


def shares(works: Sequence[GroupWork], num_engines: int) -> list[list[int]]:
    """Distribute groups over the engines, the largest groups first. Equal groups always give the same distribution.
    Return the indices of each engine's groups."""
    result: list[list[int]] = [[] for _ in range(num_engines)]
    totals = [0.0] * num_engines
    for place, work in enumerate(works):
        engine = min(range(num_engines), key=lambda index: totals[index])
        result[engine].append(place)
        totals[engine] += work.tokens()
    return result
