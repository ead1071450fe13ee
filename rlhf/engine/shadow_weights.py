"""A second copy of a rank's trained weights, for a policy that teaches itself: a moving average or a snapshot.

Under ZeRO-3 a rank copies its shares. With LoRA only the adapter is trained, so only the adapter is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ShadowWeights:
    """Copies of the trained weights, to take the weights' place for a pass."""

    def __init__(self, engine: Any, *, sharded: bool, average: bool) -> None:
        """Copy the present weights of a DeepSpeed engine. An average is kept in float32."""
        module: nn.Module = engine.module.module
        self.period = 0  # number of the period that the copies belong to, for a user with periods
        self._optimizer, self._sharded = engine.optimizer, sharded
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.copies = {
            name: _share(p).detach().to(torch.float32 if average else p.dtype, copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """Move the copies towards the weights by a share of the difference."""
        for name, parameter in self._parameters.items():
            self.copies[name].lerp_(_share(parameter).detach().to(torch.float32), rate)

    @torch.no_grad()
    def renew(self) -> None:
        """Replace the copies by the weights."""
        for name, parameter in self._parameters.items():
            self.copies[name].copy_(_share(parameter))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let passes without a gradient use the copies. The weights themselves stay untouched. Collective."""
        weights = {name: _share(parameter).data for name, parameter in self._parameters.items()}
        self._exchange(self.copies)
        try:
            yield
        finally:
            self._exchange(weights)

    def _exchange(self, tensors: dict[str, Tensor]) -> None:
        if self._sharded:
            self._optimizer.checkpoint_event_prologue()  # releases the small weights that stay gathered
        for name, parameter in self._parameters.items():
            share = _share(parameter)
            share.data = tensors[name].to(device=share.device, dtype=share.dtype)
        if self._sharded:
            self._optimizer.checkpoint_event_epilogue()  # gathers the small weights again

    def move_to(self, device: torch.device) -> None:
        """Move the copies. The tensors keep their identity."""
        for copy in self.copies.values():
            copy.data = copy.data.to(device)


def _share(parameter: nn.Parameter) -> Any:
    """Return the rank's share of a parameter: the parameter itself below ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter)
