"""The transport of weights that stay at a server of the Tinker protocol: the engines there get a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from actors.weights.manifest import WeightManifest
from actors.weights.staging import WeightSender, iterate


class SavedSender(WeightSender):
    """The policy's end. `save` saves the weights for sampling at the server, and returns the path."""

    transport = "tinker"

    def __init__(self, save: Callable[[], str]) -> None:
        super().__init__(rank=0)
        self.save = save

    def publish(self, named_weights: Iterator[tuple[str, Tensor]], version: int) -> WeightManifest:
        """Save the weights. The path names only the saved weights, and replaces a checksum."""
        iterate(named_weights)
        path = self.save()
        return WeightManifest(version=version, checksum=path, transport=self.transport, fields={"path": path})
