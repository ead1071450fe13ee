"""Check `cluster.roles.rollout.engine_args`: arguments with keys in other sections, and fixed arguments of vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf.config.problem import Problem, problem
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.rollouts import RolloutsConfig

KEY = "cluster.roles.rollout.engine_args"
_REPLICAS = "is set by cluster.roles.rollout.engines: each engine is a replica"
_FIXED = "cannot be changed"
_PLACED = f"{_FIXED}: engines are placed by cluster.roles.rollout.engines and tensor_parallel"

# vLLM's names of the arguments that the project sets, and the key to use instead or the reason.
OWNED: Mapping[str, str] = {
    **dict.fromkeys(("data_parallel_address", "data_parallel_backend", "data_parallel_external_lb"), _REPLICAS),
    **dict.fromkeys(("data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb"), _REPLICAS),
    **dict.fromkeys(("data_parallel_rank", "data_parallel_rpc_port", "data_parallel_size"), _REPLICAS),
    **dict.fromkeys(("data_parallel_size_local", "data_parallel_start_rank"), _REPLICAS),
    **dict.fromkeys(("device_ids", "distributed_executor_backend", "master_addr", "master_port"), _PLACED),
    **dict.fromkeys(("nnodes", "node_rank"), _PLACED),
    **dict.fromkeys(("enable_lora", "max_lora_rank", "max_loras"), "is set by policy.lora"),
    "disable_log_stats": f"{_FIXED}: metrics come from the run, not from vLLM's log",
    "dtype": "is set by policy.dtype, or by the evaluated model",
    "enable_return_routed_experts": "is set by policy.router_replay",
    "enable_sleep_mode": "is set by cluster.roles.rollout.colocate_with",
    "enforce_eager": "is set by cluster.roles.rollout.enforce_eager",
    "gpu_memory_utilization": "is set by cluster.roles.rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "is set by cluster.roles.rollout.kv_cache_gib on a CPU, gpu_memory_utilization on a GPU",
    "limit_mm_per_prompt": "is set by data.max_images",
    "logprobs_mode": f"{_FIXED}: training needs the log-probabilities of the sampling distribution",
    "max_logprobs": "follows from algorithm.correction.center_top_k, or from rollouts.top_k with policy.support_replay",
    "max_model_len": "follows from data.max_prompt_tokens and rollouts.max_new_tokens",
    "max_num_seqs": "is set by cluster.roles.rollout.max_num_seqs",
    "mm_processor_cache_gb": f"{_FIXED}: the engine keeps the images of its prompts in another form",
    "model": "is set by policy.model",
    "pipeline_parallel_size": "is not supported; use cluster.roles.rollout.tensor_parallel",
    "revision": "is set by policy.revision",
    "seed": "is set by run.seed, and every response has its own seed",
    "tensor_parallel_size": "is set by cluster.roles.rollout.tensor_parallel",
    **dict.fromkeys(("tokenizer", "tokenizer_revision"), "is set by policy.tokenizer"),
    "trust_remote_code": "is set by policy.trust_remote_code",
    **dict.fromkeys(("weight_transfer_config", "worker_extension_cls"), "is set by cluster.weight_sync"),
}

_DRAFTS = "speculative_config"
_NGRAM_KEYS = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")


def engine_argument_problems(cluster: ClusterConfig) -> Iterator[Problem]:
    """Yield the arguments that only the run may set."""
    given = cluster.roles.rollout.engine_args
    for name in given:
        if name in OWNED:
            yield problem(f"{KEY}.{name}", f"{OWNED[name]}; remove the key")
    if cluster.device == "cpu" and given.get("async_scheduling"):
        yield problem(
            f"{KEY}.async_scheduling",
            "is true, but vLLM has no such scheduling with cluster.device cpu; remove the key",
        )
    if cluster.device == "cpu" and given.get("enable_chunked_prefill"):
        text = (
            "is true, but with cluster.device cpu vLLM fails at a seeded response in a partial prefill; remove the key"
        )
        yield problem(f"{KEY}.enable_chunked_prefill", text)
    drafts, key = given.get(_DRAFTS), f"{KEY}.{_DRAFTS}"
    if drafts is None:
        return
    if not isinstance(drafts, dict) or drafts.get("method") != "ngram":
        text = "is not a mapping with method: ngram; other drafts need weights that no sync brings; remove the key"
        yield problem(key, text)
    elif others := sorted(drafts.keys() - set(_NGRAM_KEYS)):
        text = (
            f"has {', '.join(others)}, but with method ngram only {', '.join(_NGRAM_KEYS)} are used; remove these "
            "settings"
        )
        yield problem(key, text)


def draft_problems(cluster: ClusterConfig, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield the keys of rollouts ignored by speculative decoding."""
    if cluster.roles.rollout.engine_args.get(_DRAFTS) is None:
        return
    if rollouts.min_p > 0.0:
        text = f"is {rollouts.min_p:g}, but {_DRAFTS} is set, and vLLM does not accept both; set 0"
        yield problem("rollouts.min_p", text)
    if rollouts.carry_over:
        text = f"is true, but {_DRAFTS} is set, and a continued response would draw other random numbers; set false"
        yield problem("rollouts.carry_over", text)
