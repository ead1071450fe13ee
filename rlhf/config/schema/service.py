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
    """Most adapters on the ranks at the same time, and most with running samples in an engine. Other adapters wait on
    disk. Refused without policy.lora, as packed_tokens: a single model is on the ranks."""
    packed_tokens: int = Field(default=0, ge=0)
    """Most tokens of several adapters in one forward and backward pass: calls waiting at the same time go together.
    Faster for small calls, at ZeRO stage 0; a model's numbers then differ in rounding from those of the model alone.
    0: the adapters take turns."""
    max_models: int = Field(default=64, ge=1)
    """Most models of one key in sessions that are not finished. The models of a client without a request or heartbeat
    for 5 minutes do not count, and stay."""
    checkpoint_gib: float = Field(default=100.0, gt=0.0, allow_inf_nan=False)
    """Most GiB of checkpoints of one key, samplers included."""
    idle_s: float = Field(default=300.0, gt=0.0, allow_inf_nan=False)
    """Seconds without a request of a model, until the model moves to disk. The model comes back with the next one."""


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
