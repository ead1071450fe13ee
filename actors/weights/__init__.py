"""Weight transports from the policy to the rollout engines.

The policy's end is a WeightSender. The engines' end is a vLLM weight-transfer backend with the same name, registered in
every vLLM worker by `actors.weights.vllm_extension`. Importing this package imports neither vLLM nor Ray.

A new transport needs a sender, a ReloadEngine, a line in each of the two tables, and its traits in
`rlhf.config.transports`.
"""

from __future__ import annotations

from collections.abc import Mapping

from actors.weights.broadcast import BroadcastSender, NcclSender
from actors.weights.ipc import IpcSender
from actors.weights.manifest import WeightManifest
from actors.weights.shm import ShmSender
from actors.weights.staging import Meeting, WeightSender
from rlhf.config.transports import Transport

__all__ = ["RECEIVERS", "SENDERS", "Meeting", "Transport", "WeightManifest", "WeightSender"]

SENDERS: Mapping[Transport, type[WeightSender]] = {
    "shm": ShmSender,
    "gloo": BroadcastSender,
    "nccl": NcclSender,
    "ipc": IpcSender,
}

RECEIVERS: Mapping[Transport, str] = {  # classes in actors.weights.vllm_receivers, which only vLLM's workers import
    "shm": "ShmEngine",
    "gloo": "GlooEngine",
    "nccl": "NcclEngine",
    "ipc": "IpcEngine",
}
