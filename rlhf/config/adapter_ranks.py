"""Derive the configuration of the ranks of a service for clients: of many adapters, or of one whole model."""

from __future__ import annotations

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.run import RunConfig
from rlhf.engine.partitions import TENANT_STAGES


def ranks_config(
    policy: PolicyConfig, run: RunConfig, cluster: ClusterConfig, *, max_tokens_per_microbatch: int
) -> Config:
    """Return the configuration of the ranks, of a configuration checked by rlhf.config.validation.service.

    policy.lora.rank is the largest rank of an adapter. Without policy.lora all weights are trained. A client's call
    brings the loss, or the settings of the optimizer.
    """
    resources = cluster.roles.policy
    if "zero_stage" not in resources.model_fields_set:
        divides = policy.lora is None and resources.workers > 1  # an adapter's states are small
        resources = resources.model_copy(update={"zero_stage": TENANT_STAGES[divides]})
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
