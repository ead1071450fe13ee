"""Weight transports from the policy to the rollout engines.

The policy's end is a WeightSender. The engines' end is a vLLM weight-transfer backend with the same name, registered in
every vLLM worker by `actors.weights.vllm_extension`. Importing this package imports neither vLLM nor Ray.

A new transport needs a sender, a ReloadEngine, and a line in each of the two tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from actors.weights.broadcast import BroadcastSender, NcclSender
from actors.weights.ipc import IpcSender
from actors.weights.manifest import WeightManifest
from actors.weights.shm import ShmSender
from actors.weights.staging import Meeting, WeightSender
from rlhf.config.schema.cluster import Transport

__all__ = ["ENGINES", "SENDERS", "Meeting", "Transport", "WeightManifest", "WeightSender"]

SENDERS: Mapping[Transport, type[WeightSender]] = {
    "shm": ShmSender,
    "gloo": BroadcastSender,
    "nccl": NcclSender,
    "ipc": IpcSender,
}

ENGINES: Mapping[Transport, tuple[str, str]] = {  # module and class, which only vLLM's workers import
    "shm": ("actors.weights.vllm_shm", "ShmEngine"),
    "gloo": ("actors.weights.vllm_broadcast", "GlooEngine"),
    "nccl": ("actors.weights.vllm_broadcast", "NcclEngine"),
    "ipc": ("actors.weights.vllm_ipc", "IpcEngine"),
}
