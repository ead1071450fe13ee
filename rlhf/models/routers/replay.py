"""Let a trainer's routers choose the sampler's experts for the same tokens.

Rollout routing replay (R3, arXiv:2510.11370): if two experts have nearly equal scores, sampler and trainer may choose
different experts. The log-probabilities then differ by much more than rounding. A replayed choice keeps the trainer's
scores, so routers are trained as before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.packed.forward import body_of
from rlhf.models.packed.packed_row import in_row_order
from rlhf.models.packed.row_layout import RowLayout, row_layout
from rlhf.models.packed.sequence_parallel import own_part
from rlhf.models.routers.recording import routers_of, scores_of

UNKNOWN = -1  # in a column of experts: the trainer's own choice


class RouterReplay:
    """Replaces the choices of a model's routers inside `of`. UserError for models without routers or packed rows."""

    def __init__(self, model: nn.Module) -> None:
        names = {module: name for name, module in model.named_modules()}
        routers = routers_of(model)
        if not routers:
            raise UserError(
                f"policy.router_replay: is true, but {type(model).__name__} has no routers. Remove the key."
            )
        if row_layout(model) is RowLayout.ONE_BY_ONE:
            raise UserError(
                f"policy.router_replay: is true, but the sequences of {type(model).__name__} are not packed, and a "
                "replay needs packed rows. Remove the key."
            )
        for router in routers:
            (layer, *_) = re.findall(r"\.(\d+)\.", names[router])
            router.register_forward_hook(partial(self._replace, int(layer)))
        body_of(model).register_forward_pre_hook(self._begin)
        self._next: Tensor | None = None  # for the next forward pass
        self._experts: Tensor | None = None  # of the last forward pass; the backward pass may recompute the layers
        self._proven: set[nn.Module] = set()

    @contextmanager
    def of(self, experts: Int[Tensor, "n L K"]) -> Iterator[None]:
        """Replay a row's choices, by layer of the model, in the forward pass inside and in the backward pass."""
        self._next = experts
        try:
            with in_row_order():
                yield
        finally:
            self._next = None

    def _begin(self, body: nn.Module, inputs: Any) -> None:
        """Take this rank's part of the row, before the first layer: a forward pre-hook."""
        self._experts, self._next = self._next, None
        if self._experts is not None:
            self._experts = self._experts[own_part(len(self._experts))]

    def _replace(self, layer: int, router: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Return a router's outputs with the replayed choice: a forward hook."""
        if self._experts is None:
            return None
        if router not in self._proven:
            with torch.no_grad():
                self._prove(router, outputs)
        logits, weights, own = outputs
        told = self._experts[:, layer].to(own)
        told = F.pad(told, (0, 0, 0, len(own) - len(told)), value=UNKNOWN)  # a filled-up row ends with padding
        chosen = torch.where(told == UNKNOWN, own, told)
        return logits, weights_of(router, logits, chosen).to(weights.dtype), chosen

    def _prove(self, router: nn.Module, outputs: Any) -> None:
        """Raise UserError unless the weights of the router's own choice follow from the router's scores."""
        if isinstance(outputs, tuple) and len(outputs) == 3:
            logits, weights, own = outputs
            if torch.allclose(weights_of(router, logits, own).to(weights.dtype), weights, rtol=1e-2, atol=1e-4):
                self._proven.add(router)
                return
        raise UserError(
            f"policy.router_replay: is true, but {type(router).__name__} weighs its experts in a way that this program "
            "does not know. Remove the key."
        )


def weights_of(router: Any, logits: Float[Tensor, "n E"], chosen: Int[Tensor, "n K"]) -> Float[Tensor, "n K"]:
    """Return a router's weights of chosen experts, from the scores of all experts."""
    weights = scores_of(router, logits).gather(1, chosen)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * float(getattr(router, "routed_scaling_factor", 1.0))
