"""The rollout role: vLLM engines among which prompts are dealt out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.calls import explain, wait_all
from actors.gang import END_WITHIN_S, largest
from actors.weights.manifest import WeightManifest
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup, MemoryReport
from rlhf.types import GroupRequest, RolloutInfo, Sampling


class RolloutEngines:
    """All engines of a run.

    Requests are dealt out by their place in the list and admitted to an engine together, in order: so a batch of the
    same requests under the same weights is scheduled, and rounded, alike whenever it is made.
    """

    def __init__(self, handles: Sequence[ActorHandle[Any]], *, deadline_s: float) -> None:
        self.handles = handles
        self.deadline_s = deadline_s

    async def _all(self, refs: Sequence[ObjectRef[Any]], stage: str, *, deadline_s: float | None = None) -> list[Any]:
        return await wait_all(refs, role="rollout", stage=stage, deadline_s=deadline_s or self.deadline_s)

    async def start(self, *, deadline_s: float) -> None:
        """Start all engines."""
        await self._all([h.start.remote() for h in self.handles], "start", deadline_s=deadline_s)

    async def generate(self, requests: Sequence[GroupRequest], sampling: Sampling) -> AsyncIterator[CompletedGroup]:
        """Answer all requests; groups come as they are completed. The first failure ends the wait."""
        shares = [requests[i :: len(self.handles)] for i in range(len(self.handles))]
        await self._all([h.hold.remote() for h in self.handles], "rollouts")
        columns: dict[int, Any] = {}
        waits: dict[asyncio.Future[Any], tuple[GroupRequest, int]] = {}
        for engine, (handle, share) in enumerate(zip(self.handles, shares, strict=True)):
            for request in share:
                rollouts, infos = handle.generate.options(num_returns=2).remote(request, sampling)
                columns[request.group_id] = rollouts
                waits[asyncio.wrap_future(infos.future())] = (request, engine)
        releases = [h.release.remote(len(share)) for h, share in zip(self.handles, shares, strict=True)]
        await self._all(releases, "rollouts")
        try:
            while waits:
                done, _ = await asyncio.wait(waits, timeout=self.deadline_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    stuck = sorted({engine for _, engine in waits.values()})
                    raise RunError(
                        f"rollouts: engines {stuck} finished none of their {len(waits)} prompts in "
                        f"{self.deadline_s:.0f} s (cluster.call_timeout_s). The run can be resumed with --resume auto."
                    )
                for future in sorted(done, key=lambda f: waits[f][0].group_id):
                    request, engine = waits.pop(future)
                    if future.exception() is not None:
                        raise explain(future.exception(), role="rollout", rank=engine, stage="rollouts")
                    infos: tuple[RolloutInfo, ...] = future.result()
                    yield CompletedGroup(request=request, rollouts=columns[request.group_id], infos=infos)
        finally:
            for future in waits:
                future.cancel()

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a published set; the engines must then have its version and its bytes."""
        receipts = await self._all([h.update_weights.remote(manifest) for h in self.handles], "weight sync")
        for engine, receipt in enumerate(receipts):
            if (receipt.version, receipt.checksum) != (manifest.version, manifest.checksum):
                raise RunError(
                    f"weight sync: rollout engine {engine} has version {receipt.version} with checksum "
                    f"{receipt.checksum}; the policy published version {manifest.version} with {manifest.checksum}. "
                    "The run stops before it samples from weights that are not the policy's."
                )

    async def probe(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each engine's log-probabilities of token_ids[1:]."""
        return await self._all([h.probe.remote(tuple(token_ids)) for h in self.handles], "weight sync")

    async def sleep(self) -> None:
        """Give the GPUs to the trainers."""
        await self._all([h.sleep.remote() for h in self.handles], "sleep")

    async def wake(self) -> None:
        """Take the GPUs back."""
        await self._all([h.wake.remote() for h in self.handles], "wake")

    async def memory(self) -> MemoryReport:
        """Peaks over the engines."""
        return largest(await self._all([h.memory.remote() for h in self.handles], "memory"))

    async def stop(self) -> None:
        """Shut the engines down in order."""
        await self._all([h.shutdown.remote() for h in self.handles], "stop", deadline_s=END_WITHIN_S)
        self.end()

    def end(self) -> None:
        """End the engines at once."""
        for handle in self.handles:
            ray.kill(handle)
