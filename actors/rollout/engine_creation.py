"""Create the actors of the rollout engines, for a run or for a model on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.roles.gang import PolicyGang
from actors.roles.group import SpawnOne
from actors.rollout.engine_actor import RolloutSpec, RolloutWorker, engine_environment
from actors.rollout.engine_group import RolloutEngines
from rlhf.agents.sessions import AgentSpec
from rlhf.config.derive import sampler_top_tokens, saved_rank, ships_adapter, weight_sync
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.root import Config
from rlhf.engine.memory import peak_memory
from rlhf.models.files.loading import load_model_config
from rlhf.models.on_disk import ModelOnDisk
from rlhf.models.support import refuse_without_engine
from rlhf.process.owned_folders import keep_temporary_files_apart
from rlhf.rollouts.environments.conversations import EnvironmentSpec
from rlhf.types import MemoryReport
from rlhf.vision.reading import ImageFolder

ASKED_AT_ONCE = 10_000  # calls queued in an engine's actor; vLLM has a separate queue


class RolloutEngine(RolloutWorker):
    async def start(self) -> None:
        """Load the model. vLLM's temporary files are removed with the engine, or after a kill by the next engine."""
        self._temporary_files = keep_temporary_files_apart()
        await super().start()

    async def shutdown(self) -> None:
        await super().shutdown()
        self._temporary_files.remove()

    async def memory(self) -> MemoryReport:
        """Return the peaks of this process and, on GPUs, of the engine's workers, possibly in other processes."""
        return MemoryReport(rss_gib=peak_memory().rss_gib, gpu_gib=await self.gpu_peak_gib())


def engine_spec(config: Config, *, max_model_len: int, environment: EnvironmentSpec | AgentSpec | None) -> RolloutSpec:
    """Return the settings of a run's engines that depend neither on `cluster` nor on the run's folder."""
    policy, rollouts, lora = config.policy, config.rollouts, config.policy.lora
    assert rollouts is not None
    return RolloutSpec(
        model=policy.model,
        tokenizer=policy.tokenizer,
        dtype=policy.dtype,
        max_model_len=max_model_len,
        transport=None,
        lora_rank=saved_rank(lora) if lora is not None and ships_adapter(config) else None,
        trust_remote_code=policy.trust_remote_code,
        records_experts=policy.router_replay,
        top_logprobs=sampler_top_tokens(config),
        spools_failures=rollouts.max_staleness > 0,
        carries_over=rollouts.carry_over,
        kv_after_update=rollouts.kv_after_update if rollouts.weight_updates == "in_flight" else None,
        environment=environment,
    )


def start_engines(
    config: Config,
    placement: Placement,
    *,
    max_model_len: int,
    spool: Path,
    environment: EnvironmentSpec | AgentSpec | None,
    images: ImageFolder | None = None,
    engine: type[RolloutEngine] = RolloutEngine,
) -> RolloutEngines:
    """Create the engines' actors, without models yet, to wait for the policy's weights.

    images: of the prompts, for a model that sees.
    """
    role, sync = config.cluster.roles.rollout, weight_sync(config.cluster, one_host=placement.on_one_host())
    spec = replace(
        engine_spec(config, max_model_len=max_model_len, environment=environment),
        transport=sync.method,
        sender_address=None if placement.on_one_host() else placement.addresses_of(PolicyGang.role)[0],
        colocated=role.colocate_with is not None,
        spool=spool,
        images=images,
    )
    engines = RolloutEngines(
        *spawn_engines(spec, config.cluster, placement, engine),
        sync=sync,
        deadline_s=config.cluster.call_timeout_s,
        tensor_parallel=role.tensor_parallel,
        conversation_tokens=None if environment is None else environment.max_tokens,
    )
    engines.placement = placement
    return engines


def serve_engines(
    model: ModelOnDisk,
    cluster: ClusterConfig,
    placement: Placement,
    *,
    max_model_len: int,
    environment: EnvironmentSpec | AgentSpec | None = None,
    images: ImageFolder | None = None,
    engine: type[RolloutEngine] = RolloutEngine,
) -> RolloutEngines:
    """Create frozen engines for a model on disk, not started yet.

    images: of the prompts, for a model that sees.
    """
    spec = RolloutSpec(
        model=model.base,
        tokenizer=model.tokenizer,
        dtype=model.dtype,
        max_model_len=max_model_len,
        transport=None,
        adapter=model.adapter,
        lora_rank=model.lora_rank,
        trust_remote_code=model.trust_remote_code,
        environment=environment,
        images=images,
    )
    return RolloutEngines(*spawn_engines(spec, cluster, placement, engine), deadline_s=cluster.call_timeout_s)


def spawn_engines(
    common: RolloutSpec, cluster: ClusterConfig, placement: Placement, engine: type[RolloutEngine] = RolloutEngine
) -> tuple[list[ActorHandle[Any]], SpawnOne]:
    """Create an actor for each slot. Return the actors, and a function that creates the actor of a slot again.

    The cluster and the slot add settings to the common settings. Raise UserError if vLLM cannot compute the model.
    """
    shape = load_model_config(common.model, trust_remote_code=common.trust_remote_code)
    refuse_without_engine(shape.to_dict(), device=cluster.device)
    role, places = cluster.roles.rollout, placement.seats or placement
    remote = ray.remote(engine)

    def spawn_one(rank: int) -> ActorHandle[Any]:
        spec = replace(
            common,
            name=f"rollout engine {rank}",
            max_num_seqs=role.max_num_seqs,
            device=cluster.device,
            threads=places.threads(RolloutEngines.role, role.threads)[rank],
            kv_cache_gib=float(role.kv_cache_gib) if cluster.device == "cpu" else None,
            gpu_memory_utilization=role.gpu_memory_utilization,
            tensor_parallel=role.tensor_parallel,
            enforce_eager=role.enforce_eager or cluster.device == "cpu",
            engine_args=role.engine_args,
            start_timeout_s=cluster.start_timeout_s,
            call_timeout_s=cluster.call_timeout_s,
        )
        options = places.options(RolloutEngines.role, rank, engine_environment(spec), concurrency=ASKED_AT_ONCE)
        return remote.options(**options).remote(spec)

    return [spawn_one(rank) for rank in range(role.workers)], spawn_one
