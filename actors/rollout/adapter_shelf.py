"""The LoRA adapters in the memory of one engine.

An engine has room for a few adapters. An idle adapter gives way to a requested one, and is read again when requested.
Before the first sample after each load, two checks must pass: the file has the bytes that the policy wrote, and the
engine gives the policy's log-probabilities of the probe. vLLM itself would read an evicted adapter during a step,
without a check of the bytes, and a missing folder would end the engine. So vLLM never gets more adapters than it has
room for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from actors.rollout.engine_calls import EngineCalls
from actors.rollout.vllm_engine import adapter_request, add_adapter
from actors.weights.adapter import WEIGHTS, file_checksum
from rlhf.controller.weight_sync import compare_probe
from rlhf.errors import RunError, UserError
from rlhf.roles import PolicyProbe

Probed = Callable[[Sequence[int], Any], Awaitable[list[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An exported adapter. No other adapter ever gets this number, so no engine confuses two adapters."""

    name: str
    number: int
    folder: Path
    checksum: str  # checksum of the weights' file, by file_checksum
    probe: PolicyProbe


class AdapterShelf:
    """The adapters that an engine holds. `probed` returns the engine's log-probabilities of a text by an adapter."""

    def __init__(self, calls: EngineCalls, *, room: int, probed: Probed) -> None:
        self.calls = calls
        self.room = room
        self.probed = probed
        self._users: dict[int, int] = {}  # running requests by the adapter's number, the last used adapter last
        self._door = asyncio.Lock()  # first come, first served: no adapter overtakes a waiting adapter
        self._left = asyncio.Event()

    @asynccontextmanager
    async def held(self, adapter: ServedAdapter) -> AsyncIterator[Any]:
        """Yield vLLM's name for an adapter, which stays in memory during the block."""
        async with self._entered():
            if adapter.number not in self._users:
                await self._bring(adapter)
            self._users[adapter.number] = self._users.pop(adapter.number) + 1
        try:
            yield self.request_of(adapter)
        finally:
            self._users[adapter.number] -= 1
            self._left.set()

    async def load(self, adapter: ServedAdapter) -> float:
        """Read an adapter, and return the largest difference from the policy's probe.

        RunError: the file has other bytes, or the engine gives other log-probabilities than the policy.
        """
        async with self._entered():
            return await self._bring(adapter)

    async def remove(self, number: int) -> None:
        """Forget an adapter without running requests."""
        async with self._entered():
            if self._users.get(number) == 0:
                await self._drop(number)

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[None]:
        await self.calls.within(self._door.acquire(), "the adapters before")
        try:
            yield
        finally:
            self._door.release()

    def request_of(self, adapter: ServedAdapter) -> Any:
        """Return vLLM's name for an adapter. vLLM's prefix cache keeps adapters apart by this name."""
        return adapter_request(f"{adapter.name}#{adapter.number}", adapter.number, str(adapter.folder))

    async def _bring(self, adapter: ServedAdapter) -> float:
        await self._make_room()
        difference = await self.read(adapter)
        self._users[adapter.number] = 0
        return difference

    async def read(self, adapter: ServedAdapter) -> float:
        """Let the engine read an adapter, and return the largest difference from the policy's probe."""
        who = f"{self.calls.loop.name} with adapter {adapter.name}"
        await self.calls.within(asyncio.to_thread(_refuse_other_file, adapter, who), "the file of an adapter")
        lora, is_proven = self.request_of(adapter), False
        try:
            await self.calls.run(lambda engine: add_adapter(engine, lora), "an adapter")
            theirs = await self.probed(adapter.probe.token_ids, lora)
            difference = compare_probe(adapter.probe.logprobs, theirs, who=who, dtype=adapter.probe.dtype)
            is_proven = True
        finally:
            if not is_proven:
                await self.forget(adapter.number)
        return difference

    async def _make_room(self) -> None:
        while len(self._users) >= self.room:
            idle = next((number for number, users in self._users.items() if users == 0), None)
            if idle is None:
                self._left.clear()
                await self.calls.within(self._left.wait(), f"one of {self.room} adapters to have no running samples")
            else:
                await self._drop(idle)

    async def _drop(self, number: int) -> None:
        del self._users[number]
        await self.forget(number)

    async def forget(self, number: int) -> None:
        await self.calls.run(lambda engine: engine.remove_lora(number), "the end of an adapter")


def _refuse_other_file(adapter: ServedAdapter, who: str) -> None:
    path = adapter.folder / WEIGHTS
    try:
        found = file_checksum(path)
        if found != adapter.checksum:
            raise RunError(
                f"{who} read {path} with checksum {found}, but the policy wrote {adapter.checksum}. The file was "
                "changed or damaged after the export. Export the adapter again."
            )
        with safe_open(path, framework="np") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise RunError(f"{who} cannot read {path}: {error}") from error
    if head := next((name for name in names if "lm_head" in name), None):
        raise UserError(
            f"{path} adapts the output layer ({head}), where vLLM scores prompts wrongly with several adapters. Train "
            "an adapter that adapts only the layers of attention and MLP."
        )
