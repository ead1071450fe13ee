"""The weights of an engine: their version, how another version arrives, and whether they are in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from actors.rollout.engine_calls import EngineCalls
from actors.rollout.vllm_engine import (
    LoadedWeights,
    RolloutSpec,
    load_adapter,
    load_weights,
    policy_adapter,
    serve_own_weights,
)
from actors.weights import WeightManifest
from rlhf.errors import RunError
from rlhf.roles import EnginePart


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReceipt:
    """The version and the checksum reported by an engine after a sync."""

    version: int
    checksum: str


class EngineWeights:
    """The state of an engine's weights. An unfrozen engine has no weights before the first sync."""

    def __init__(self, spec: RolloutSpec, calls: EngineCalls) -> None:
        self.spec = spec
        self.calls = calls
        self.version: int | None = None
        self.checksum = ""  # checksum of the weights of this version
        self.lora: Any = None  # the adapter named in requests
        self._asleep: set[EnginePart] = set()  # parts whose GPU memory a trainer uses now
        self._updating = asyncio.Lock()
        self._is_settled = asyncio.Event()  # no update is in progress, and the last update has not failed
        self._is_settled.set()

    async def serve_own(self) -> None:
        """Serve the weights of the model folder as version 0: the engine is frozen."""
        self.lora = await self.calls.run(
            lambda engine: serve_own_weights(engine, self.spec), "its adapter", self.spec.start_timeout_s
        )
        self.version = 0

    def synced_version(self) -> int:
        """Return the version. RunError if the engine was never synced, is being synced, or sleeps."""
        if self.version is None:
            raise RunError(
                f"{self.spec.name} has not received the policy's weights yet, so it cannot generate. "
                "It must be synced first."
            )
        self.refuse_asleep("weights", "cache")
        return self.version

    async def settled_version(self) -> int:
        """Return the version, after any update in progress. RunError as in `synced_version`.

        After a failed update, wait for the next update: the driver repeats the update, or ends the run.
        """
        while not self._is_settled.is_set():
            await self.calls.within(self._is_settled.wait(), "an update of its weights")
        return self.synced_version()

    def refuse_frozen(self) -> None:
        if self.spec.is_frozen:
            raise RunError(
                f"{self.spec.name} is frozen: it answers with the weights of {self.spec.model} and no others."
            )

    def refuse_asleep(self, *parts: EnginePart) -> None:
        for part in parts:
            if part in self._asleep:
                raise RunError(f"{self.spec.name} is asleep: its {part} must be woken first.")

    async def update(self, manifest: WeightManifest, version: int) -> SyncReceipt:
        """Load a published set of weights between two steps. Samples in flight continue with the new weights.

        After a failure the model may have a part of the weights, so no step begins before another update.
        RunError: the checksum of the received weights is wrong, or the engine is frozen.
        """
        self.refuse_frozen()
        self.refuse_asleep("weights")
        if manifest.version != version:
            which = f"version {version} was requested, but the manifest describes version {manifest.version}"
            raise RunError(f"{self.spec.name}: {which}")
        async with self._updating:
            self._is_settled.clear()
            receipt = await self._load(manifest)
            self._is_settled.set()
        return receipt

    async def _load(self, manifest: WeightManifest) -> SyncReceipt:
        self.version = None  # reset first: weights that failed to load must not sample
        place = f"{self.spec.name}: weight sync to version {manifest.version}"
        is_adapter, keeps = manifest.transport == "adapter", self.spec.kv_after_update == "keep"
        load = load_adapter if is_adapter else load_weights

        def update(engine: Any) -> LoadedWeights:
            self.calls.loop.is_paused = True
            loaded = load(engine, manifest, keep_cache=keeps)
            self.calls.loop.is_paused = False
            return loaded

        loaded = await self.calls.run(update, f"version {manifest.version} of the weights")
        wrong = [(rank, checksum) for rank, checksum in enumerate(loaded.checksums) if checksum != manifest.checksum]
        if wrong:
            raise RunError(
                f"{place}: worker {wrong[0][0]} read bytes with checksum {wrong[0][1]}, the policy wrote "
                f"{manifest.checksum} for version {manifest.version}. The weights were damaged in transit."
            )
        if loaded.reusable_blocks:
            raise RunError(
                f"{place}: {loaded.reusable_blocks} blocks of keys and values that earlier weights computed are still "
                "cached for requests that start now"
            )
        self.lora = policy_adapter(manifest) if is_adapter else None
        self.version, self.checksum = loaded.version, loaded.checksums[0]
        return SyncReceipt(version=loaded.version, checksum=loaded.checksums[0])

    async def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU to the trainer: free the cache, and the weights unless keep_weights moves them to host memory.

        The next sync brings freed weights again. With LoRA the base weights always stay in host memory, since no sync
        brings base weights.
        """
        if self.spec.device == "cuda":
            keeps = keep_weights or self.spec.lora_rank is not None
            self.version = self.version if keeps else None
            self._asleep = {"weights", "cache"}
            await self.calls.run(lambda engine: engine.sleep(level=1 if keeps else 2), "its sleep")

    async def wake(self, part: EnginePart) -> None:
        """Take GPU memory back: first for the weights (a sync may fill this memory), then for the cache."""
        if self.spec.device == "cuda":
            tag = {"weights": "weights", "cache": "kv_cache"}[part]
            await self.calls.run(lambda engine: engine.wake_up(tags=[tag]), f"the {part} to wake")
            self._asleep.discard(part)
