"""One rank of a policy that trains all weights of one model, for a client with its own loop.

The model takes the place of an adapter, but is never swapped: the state of the engine is the state of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.adapters import AdapterShape
from rlhf.errors import UserError
from rlhf.workers.adapters.adapter_worker import AdapterWorker, HeldAdapter
from rlhf.workers.trained import TrainedWorker


class WholeWorker(AdapterWorker):
    """Trains all weights of the model named by each call, as AdapterWorker trains adapters."""

    def build(self) -> str:
        fingerprint = TrainedWorker.build(self)
        self.swapping = self.engine.open_swapping()
        self.adapters = {}
        self.has_base_weights = True  # whether the weights are still those of the base model
        return fingerprint

    def create(self, name: str, shape: AdapterShape) -> None:
        """Begin with the base model's weights. UserError: another model is here, or the shape is an adapter's."""
        if held := next(iter(self.adapters), None):
            raise UserError(
                f"These ranks train all weights, of one model at a time, and hold {held}. Remove that model first."
            )
        if not shape.trains_all:
            raise UserError(f"rank: is {shape.rank}, but all weights are trained here, without adapters. Set it to 0.")
        if not self.has_base_weights:
            with self.explaining("start"):
                self.swapping.restart(self.load_module())
        self.adapters[name] = HeldAdapter(shape=shape, tenant=self.swapping.only())
        self.has_base_weights = False

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write a checkpoint of the model, as of a run. Collective."""
        self._adapter(name)
        self.save(folder)

    def load_adapter(self, name: str, folder: Path, *, optimizer: bool) -> None:
        """Restore a checkpoint written by any number of ranks, and drop the gradient. Collective."""
        model = self._adapter(name)
        self.load(folder)
        if not optimizer:
            self.swapping.restart(None)
        self.swapping.drop_gradient(model.tenant)
        model.dropped_because = None

    def export_adapter(self, name: str | None, folder: Path) -> None:
        """Write the model as a Hugging Face folder, in the model's dtype. None: as loaded, before any training."""
        self._find(name)
        self.export(folder)

    def probe_adapter(self, name: str | None, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of token_ids[1:] at temperature 1. None: as loaded, before any training."""
        self._find(name)
        return self.probe(token_ids)

    def _find(self, name: str | None) -> None:
        if name is not None:
            self._adapter(name)
        elif not self.has_base_weights:
            raise UserError(
                "These ranks no longer have the weights of the base model, because they have trained a model."
            )

    def _use(self, adapter: HeldAdapter) -> None:
        """Do nothing: the model is in the engine."""
