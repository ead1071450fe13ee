"""Weight transports: how a published set of weights reaches the rollout engines.

The policy's end is a WeightSender; the engines' end is a vLLM weight-transfer backend of the same name, registered by
`actors.weights.vllm_extension` in every vLLM worker. Importing this package imports neither vLLM nor Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from actors.weights.manifest import WeightManifest

__all__ = ["WeightManifest", "WeightSender"]


class WeightSender(Protocol):
    """The policy's end of a transport, one on every rank."""

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest | None:
        """Stage the weights. Iterating may be a collective: all ranks call it. None on ranks other than 0."""
        ...

    def send(self, manifest: WeightManifest) -> None:
        """Move the staged bytes, while the engines receive. Nothing where they read them by themselves."""
        ...

    def close(self) -> None:
        """Give back what the transport holds."""
        ...
