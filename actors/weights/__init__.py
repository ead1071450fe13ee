"""Weight transports from the policy to the rollout engines.

The policy's end is a WeightSender. The engines' end is a vLLM weight-transfer backend with the same name, registered in
every vLLM worker by `actors.weights.vllm_extension`. Importing this package imports neither vLLM nor Ray.

A new transport needs a sender, a ReloadEngine, and a line in each of the two tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from actors.weights.broadcast import BroadcastSender, Meeting
from actors.weights.ipc import IpcSender
from actors.weights.manifest import WeightManifest
from actors.weights.shm import ShmSender

__all__ = ["Meeting", "Transport", "WeightManifest", "WeightSender", "open_sender"]

Transport = Literal["shm", "gloo", "nccl", "ipc"]


class WeightSender(Protocol):
    """The policy's end of a transport, one on every rank. In a sync: publish, send, settle.

    Iterating the weights may be a collective: in `publish` all ranks do, in `send` all or none, as the transport needs.
    """

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Describe the weights, and stage them if the engines read them by themselves. None on ranks other than 0."""
        ...

    def send(self, manifest: WeightManifest, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Send the same weights while the engines receive. Nothing where the engines read them by themselves."""
        ...

    def settle(self) -> None:
        """Free memory used only for the transfer. Called after the engines have loaded."""
        ...

    def close(self) -> None:
        """Free all resources of the transport."""
        ...


def open_sender(
    transport: Transport, *, rank: int, dtype: torch.dtype, meeting: Meeting | None, beside_engine: bool = True
) -> WeightSender:
    """Open a policy rank's sender. The broadcast transports meet their receivers here, and block until all have come.

    beside_engine: an engine shares this rank's GPU (ipc only). Rank 0 always has one.
    """
    if transport == "shm":
        return ShmSender(rank=rank, dtype=dtype)
    if transport == "ipc":
        return IpcSender(rank=rank, dtype=dtype, beside_engine=beside_engine)
    assert meeting is not None, f"{transport} needs a place to meet"
    return BroadcastSender(transport, meeting, rank=rank, dtype=dtype)
