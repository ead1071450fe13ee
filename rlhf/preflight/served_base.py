"""Find the base model of a server for clients' loops, before the server starts."""

from __future__ import annotations

from pathlib import Path

from rlhf.config.schema.service import TinkerConfig
from rlhf.errors import UserError, prefix_errors
from rlhf.models.on_disk import ModelOnDisk
from rlhf.preflight.models import resolve_model
from rlhf.preflight.sources import local_model


def server_folder(config: TinkerConfig) -> Path:
    return (config.run.dir / config.run.name).absolute()


def find_base(config: TinkerConfig) -> ModelOnDisk:
    """Return the base model. UserError: the model does not exist, or does not fit the limits of the server."""
    folder = server_folder(config)
    policy, limits = config.policy.as_loaded(), config.service
    with prefix_errors("policy.model"):
        name = local_model(policy.model, folder / "service", seed=config.run.seed)
        model = resolve_model(name, trust_remote_code=policy.trust_remote_code, device=config.cluster.device)
        if model.adapter is not None:
            raise UserError(f"{policy.model} is an adapter; name its base model, and let clients load the adapter")
    if model.max_length is not None and limits.max_length > model.max_length:
        raise UserError(
            f"service.max_length: is {limits.max_length}, more than the {model.max_length} tokens of {policy.model}"
        )
    if ":" in (limits.model_name or model.base):
        raise UserError(
            "service.model_name: is missing, and clients cannot use the colon in the model's name; set "
            "service.model_name"
        )
    return model
