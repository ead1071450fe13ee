"""Derive the configuration of the ranks of a service for clients: of many adapters, or of one whole model."""

from __future__ import annotations

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import LoraConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig
from rlhf.engine.partitions import TENANT_STAGES
from rlhf.errors import UserError


def ranks_config(
    policy: PolicyConfig, run: RunConfig, cluster: ClusterConfig, *, max_tokens_per_microbatch: int
) -> Config:
    """Return the configuration of the ranks. policy.lora.rank is the largest rank of an adapter. Without policy.lora
    all weights are trained.

    Loss and settings of the optimizer come with each call of a client. Raise UserError, with the name of the key,
    for a key without a meaning there.
    """
    if policy.lora is not None and policy.lora != LoraConfig(rank=policy.lora.rank):
        unused = sorted(policy.lora.model_fields_set - {"rank"})
        raise UserError(
            f"policy.lora: {', '.join(unused)} cannot be set here: clients choose all but the largest rank."
        )
    for key in ("adapter", "vision_lr", "router_replay", "support_replay", "router_balance_coef"):
        if getattr(policy, key):
            raise UserError(f"policy.{key}: has no effect on clients' models; remove it.")
    resources = cluster.roles.policy
    if resources.sequence_parallel > 1:
        raise UserError("cluster.roles.policy.sequence_parallel: clients' rows are not shared by ranks; remove it.")
    if resources.offload:
        raise UserError("cluster.roles.policy.offload: clients' models stay on the device; remove it.")
    if "zero_stage" not in resources.model_fields_set:
        divides = policy.lora is None and resources.workers > 1  # an adapter's states are small
        resources = resources.model_copy(update={"zero_stage": TENANT_STAGES[divides]})
    if resources.zero_stage not in TENANT_STAGES:
        raise UserError(
            f"cluster.roles.policy.zero_stage: is {resources.zero_stage}, and clients' models are trained at stage "
            "0 or 3 alone; remove it, or set 3 to divide the weights among the ranks."
        )
    roles = cluster.roles.model_copy(update={"policy": resources})
    return Config.model_validate(
        {
            "run": run,
            "policy": policy.as_loaded(),
            "algorithm": {"name": "sft"},
            "data": {"train": "none"},
            "train": {
                "steps": 1,
                "lr": 1.0,
                "weight_decay": 1.0,  # above 0, so that matrices can decay; each step brings its own value
                "sequences_per_update": 1,
                "max_tokens_per_microbatch": max_tokens_per_microbatch,
            },
            "cluster": cluster.model_copy(update={"roles": roles}),
        }
    )
