"""Define the configuration of `rlhf tinker`: one base model for clients that bring their own loops.

rlhf.config.validation.service checks the relations, and actors.serving.tinker starts the server.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.model import ModelConfig
from rlhf.config.schema.run import Folder
from rlhf.role_table import Role
from rlhf.sections import Section


class ServiceRun(Section):
    """Name, folder and seed of the server. All files are in `<dir>/<name>/`, and each client's model is a run there."""

    name: str = Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the server below `dir`. A server that starts again under this name continues the work."""
    dir: Folder = Field(default=Path("runs"), validate_default=False)
    """Folder for runs. A leading `~` is your home folder."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the initial values of adapters without a seed of the client."""


class LargestAdapter(Section):
    """The largest adapter of a client."""

    rank: int = Field(default=32, ge=1)
    """Largest rank of an adapter. An adapter of a lower rank takes the same memory."""


class ServedPolicy(ModelConfig):
    """The base model of all clients' models."""

    lora: LargestAdapter | None = LargestAdapter()
    """The largest adapter. null: a client trains all weights, of one model at a time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Recomputing saves memory and takes about a third more time."""


class ServiceConfig(Section):
    """What a server grants to its clients."""

    model_name: str | None = Field(default=None, min_length=1, pattern=r"^[^:]+$")
    """The model's name in clients' requests. Clients load their tokenizer by this name, so it is a name on the hub, or
    a folder that exists where the clients run. null: the name or the folder of policy.model."""
    max_length: int = Field(default=2048, ge=2)
    """Largest number of tokens in a row, and in a prompt with its sample."""
    max_adapters: int = Field(default=8, ge=1)
    """Largest number of adapters on the ranks at the same time, and of adapters with running samples in an engine.
    Other adapters wait on disk. Without policy.lora, this key and packed_tokens are refused, because the ranks hold a
    single model."""
    packed_tokens: int = Field(default=0, ge=0)
    """Largest number of tokens in a forward and backward pass for several adapters. Such a pass computes calls that
    wait at the same time. It is faster for small calls, and needs ZeRO stage 0. The results then differ by rounding
    from the results of a pass for one adapter. 0: the adapters take turns."""
    max_models: int = Field(default=64, ge=1)
    """Largest number of models of one API key in unfinished sessions. If a client sends no request or heartbeat for 5
    minutes, its models no longer count, but are not removed."""
    checkpoint_gib: float = Field(default=100.0, gt=0.0, allow_inf_nan=False)
    """Largest total size of one API key's checkpoints, in GiB, including the weights saved for samplers."""
    idle_s: float = Field(default=300.0, gt=0.0, allow_inf_nan=False)
    """A model without a request for this many seconds is moved from the ranks to disk. The next request loads the model
    again."""


class TinkerConfig(Section):
    """The configuration of a server for clients with their own loops."""

    run: ServiceRun
    """Name, folder and seed."""
    policy: ServedPolicy
    """The base model."""
    service: ServiceConfig = ServiceConfig()
    """Limits of clients. This section is only allowed in a file of `rlhf tinker`."""
    cluster: ClusterConfig = ClusterConfig()
    """Cluster, device and resources of each role."""

    @property
    def needs(self) -> tuple[Role, ...]:
        return ("policy", "rollout")
