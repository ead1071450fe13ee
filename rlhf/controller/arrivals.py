"""Hand over each scored group of a batch while later groups are still sampled (train.streamed)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlhf.roles import ScoredGroup


class Arrivals:
    """The kept groups of batches in turn, `size` groups each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.begin()

    def begin(self) -> None:
        """Expect the first group of a batch."""
        self._left = self.size
        self._groups: list[ScoredGroup] = []
        self._num_taken = 0
        self._changed = asyncio.Event()

    def rewind(self) -> None:
        """Hand over the groups of the batch again from the first."""
        self._num_taken = 0
        if self._groups:
            self._changed.set()

    @property
    def groups(self) -> list[ScoredGroup]:
        return list(self._groups)

    def replace(self, groups: Sequence[ScoredGroup]) -> None:
        """Replace the first arrived groups."""
        self._groups[: len(groups)] = groups

    def add(self, scored: ScoredGroup) -> None:
        self._left -= 1
        self._groups.append(scored)
        self._changed.set()

    async def take(self) -> list[ScoredGroup]:
        """Return all arrived groups not yet taken, at least one. Empty: the batch is whole."""
        await self._changed.wait()
        if self._left <= 0:
            return []
        self._changed.clear()
        begin, self._num_taken = self._num_taken, len(self._groups)
        return self._groups[begin:]
