"""Engines that sample from whole models: one set of weights at a time, for a client that trains all weights.

A sampler is a snapshot of all weights on the disk. The samples of two samplers take turns: an engine lets the running
samples end, reads the other weights with a proof, and goes on. A request waits for its turn in order of arrival.
"""

from __future__ import annotations

from typing import Literal

from actors.cluster.placement import Placement
from actors.rollout.adapter_engines import AdapterEngine, AdapterEngines, client_spec
from actors.rollout.adapter_shelf import AdapterShelf, Probed, ServedAdapter
from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_creation import spawn_engines
from actors.rollout.engine_weights import EngineWeights
from actors.rollout.vllm_engine import RolloutSpec
from actors.weights.files import FILES, manifest_of_files
from rlhf.adapters import SampleAnswer, SampleRequest
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.controller.weight_sync import compare_probe

BASE = "base"  # name of the snapshot without any training


class SnapshotShelf(AdapterShelf):
    """The one snapshot that an engine holds. vLLM knows no name for it: a request names no adapter."""

    def __init__(self, calls: EngineCalls, weights: EngineWeights, *, probed: Probed) -> None:
        super().__init__(calls, room=1, probed=probed)
        self._weights = weights

    def request_of(self, adapter: ServedAdapter) -> None:
        return None

    async def read(self, adapter: ServedAdapter) -> float:
        """Replace the weights of the engine. RunError: other bytes, or other log-probabilities, than the policy's."""
        manifest = manifest_of_files(adapter.folder, checksum=adapter.checksum, version=adapter.number)
        await self._weights.update(manifest, adapter.number)
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

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        return await super().sample(BASE if adapter is None else adapter, request)


def serve_snapshots(
    model: str,
    cluster: ClusterConfig,
    placement: Placement,
    *,
    dtype: Literal["bfloat16", "float16", "float32"],
    max_length: int,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> WholeEngines:
    """Create engines for snapshots of a model with all weights trained, not started yet. Load `BASE` next.

    The arguments are those of `serve_adapters`.
    """
    spec = client_spec(
        model,
        dtype=dtype,
        max_length=max_length,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        transport=FILES,
    )
    return WholeEngines(*spawn_engines(spec, cluster, placement, WholeEngine), deadline_s=cluster.call_timeout_s)
