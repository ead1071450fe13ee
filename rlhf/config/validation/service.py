"""Check the relations between the keys of a server for clients with their own loops."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.problem import Problem, problem
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.service import TinkerConfig
from rlhf.config.validation.cluster import cluster_problems
from rlhf.config.validation.unused_keys import unused_keys
from rlhf.engine.partitions import TENANT_STAGES


def service_problems(config: TinkerConfig) -> tuple[Problem, ...]:
    return (
        *unused_keys(config),
        *_problems(config.cluster),
        *_of_whole_models(config),
        *cluster_problems(config.cluster, config.needs, with_reward_model=False),
    )


def _problems(cluster: ClusterConfig) -> Iterator[Problem]:
    rollout, policy = cluster.roles.rollout, cluster.roles.policy
    if cluster.weight_sync != "auto":
        text = f"is {cluster.weight_sync}, and has no effect here: engines read weights from files; remove the key"
        yield problem("cluster.weight_sync", text)
    if rollout.colocate_with is not None:
        text = "is policy, but clients train and sample at the same time; remove the key"
        yield problem("cluster.roles.rollout.colocate_with", text)
    if rollout.is_elastic:
        yield problem("cluster.roles.rollout.engines", "is a range, but this server needs a fixed number of engines")
    if "zero_stage" in policy.model_fields_set and policy.zero_stage not in TENANT_STAGES:
        text = f"is {policy.zero_stage}, but clients' models are trained only at 0 or 3"
        yield problem("cluster.roles.policy.zero_stage", text)
    if policy.sequence_parallel > 1:
        text = f"is {policy.sequence_parallel}, but ranks do not share clients' rows; remove the key"
        yield problem("cluster.roles.policy.sequence_parallel", text)
    if policy.offload:
        text = f"has {', '.join(policy.offload)}, but clients' models stay on the device; remove the key"
        yield problem("cluster.roles.policy.offload", text)


def _of_whole_models(config: TinkerConfig) -> Iterator[Problem]:
    for key in ("max_adapters", "packed_tokens"):
        if config.policy.lora is None and key in config.service.model_fields_set:
            text = "has no effect without policy.lora: all weights are trained, of one model at a time; remove the key"
            yield problem(f"service.{key}", text)
