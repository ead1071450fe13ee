"""Choose the models on the ranks, whose memory has room for a few."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Resident(Protocol):
    """A model that may be on the ranks. `turn` is held while the model works or moves."""

    turn: asyncio.Lock

    async def leave_ranks(self) -> None:
        """Move the model to disk."""


class Residents:
    """The models on the ranks, at most `most`. A further model takes the place of the longest idle model."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: dict[Resident, None] = {}  # the longest idle first
        self._freed = asyncio.Condition()

    async def admit(self, model: Resident) -> None:
        """Make room for a model. Wait while every model on the ranks has a turn."""
        async with self._freed:
            while len(self._models) >= self._most and model not in self._models:
                idle = next((other for other in self._models if not other.turn.locked()), None)
                if idle is None:
                    await self._freed.wait()
                    continue
                async with idle.turn:
                    await idle.leave_ranks()
                del self._models[idle]
            self._models.pop(model, None)
            self._models[model] = None

    async def end_turn(self) -> None:
        async with self._freed:
            self._freed.notify_all()

    def forget(self, model: Resident) -> None:
        self._models.pop(model, None)
