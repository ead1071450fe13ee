"""Engines that sample from whole models: one set of weights at a time, for a client that trains all weights.

A sampler is a snapshot of all weights on the disk. The samples of two samplers take turns: an engine lets the running
samples end, reads the next weights with a proof, and continues. A request waits for its turn in order of arrival.
"""

from __future__ import annotations

from actors.rollout.adapter_engines import AdapterEngine, AdapterEngines
from actors.rollout.adapter_shelf import AdapterShelf, Probed, ServedAdapter
from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_weights import EngineWeights
from actors.rollout.vllm_engine import RolloutSpec
from actors.weights.files import FILES
from actors.weights.manifest import WeightManifest
from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.controller.weight_sync import compare_probe

BASE = "base"  # name of the snapshot without any training


class SnapshotShelf(AdapterShelf):
    """The snapshot that an engine holds. vLLM has no name for a snapshot: a request names no adapter."""

    def __init__(self, calls: EngineCalls, weights: EngineWeights, *, probed: Probed) -> None:
        super().__init__(calls, room=1, probed=probed)
        self._weights = weights

    def request_of(self, adapter: ServedAdapter) -> None:
        return None

    async def read(self, adapter: ServedAdapter) -> float:
        """Replace the weights of the engine. RunError: the bytes or the log-probabilities differ from the policy's."""
        number, fields = adapter.number, {"folder": str(adapter.folder)}
        manifest = WeightManifest(version=number, checksum=adapter.checksum, transport=FILES, fields=fields)
        await self._weights.update(manifest, number)
        theirs = await self.probed(adapter.probe.token_ids, None)
        who = f"{self.calls.loop.name} with the weights of {adapter.name}"
        return compare_probe(adapter.probe.logprobs, theirs, who=who, dtype=adapter.probe.dtype)

    async def forget(self, number: int) -> None:
        """Do nothing: the next snapshot replaces the weights."""


class WholeEngine(AdapterEngine):
    """An engine as a Ray actor, with one snapshot in memory."""

    def __init__(self, spec: RolloutSpec) -> None:
        super().__init__(spec)
        self.adapters = SnapshotShelf(self.calls, self.weights, probed=self._probed)


class WholeEngines(AdapterEngines):
    """The engines, whose snapshots are known by name. See AdapterEnginesRole. `BASE` must be loaded first."""

    actor = WholeEngine
    transport = FILES

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        return await super().sample(BASE if adapter is None else adapter, request)
