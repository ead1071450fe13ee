"""Traits of the weight transports that validation and plans need. Senders and receivers are in actors.weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Transport = Literal["shm", "gloo", "nccl", "ipc"]


@dataclass(frozen=True, slots=True)
class TransportTraits:
    """Where a transport works, and what the transport leaves behind."""

    device: Literal["cpu", "cuda"]
    shares_gpus: bool = False  # between the policy and the engines
    one_host: bool = False
    meets: bool = False  # both ends broadcast together; no published weights remain for a successor
    stays: bool = False  # whether an engine can load the weights at any time before the next publication


TRANSPORTS: Mapping[Transport, TransportTraits] = {
    "shm": TransportTraits("cpu", one_host=True, stays=True),
    "gloo": TransportTraits("cpu", meets=True),
    "nccl": TransportTraits("cuda", meets=True),
    "ipc": TransportTraits("cuda", shares_gpus=True, one_host=True),
}
