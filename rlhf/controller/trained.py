"""Describe the weights of a checkpoint in the keys of the configuration.

It is saved with them and compared on resume.
"""

from __future__ import annotations

from typing import Any

from rlhf.config.derive import critic_model
from rlhf.config.files.differences import home, portable
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.root import Config


def trained_models(config: Config) -> dict[str, Any]:
    """Return each trained role's model, adapter shape, dtype, number of ranks and sharding."""
    models: dict[str, PolicyConfig | CriticConfig] = {"policy": config.policy}
    if config.algorithm.has_critic:
        models["critic"] = critic_model(config)
    roles = config.cluster.roles.model_dump(mode="json")
    tree: dict[str, Any] = {
        role: model.model_dump(mode="json", include={"model", "adapter", "dtype", "lora"})
        for role, model in models.items()
    }
    for role in models:
        if tree[role]["lora"] is not None:
            del tree[role]["lora"]["dropout"]  # may change between runs, like the learning rate
    ranks = {role: {key: roles[role][key] for key in ("workers", "zero_stage")} for role in models}
    described: dict[str, Any] = portable(tree | {"cluster": {"roles": ranks}}, home(config))
    return described
