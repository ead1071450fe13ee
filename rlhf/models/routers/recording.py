"""Record the choices of a mixture's routers in a forward pass over a packed row.

The record reads scores and choices from the routers' outputs. Models without routers give an empty record.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.packed.branches import Branches, trunks
from rlhf.models.packed.packed_row import in_row_order
from rlhf.models.packed.sequence_parallel import SequenceGroup, current_group, own_part, rows_shared_by, summed
from rlhf.objectives.load_balance import balance_loss

_SIGMOIDS = {"AfmoeTokenChoiceRouter", "HYV3TopKRouter", "Lfm2MoeTopKRouter", "MiniMaxM2TopKRouter"}
_SOFTMAXES = {"LongcatFlashTopkRouter"}


def routers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the routers of a model by layer. A router stands beside the experts of a layer."""
    return tuple(
        router
        for block in model.modules()
        if isinstance(getattr(block, "experts", None), nn.Module)
        for router in (getattr(block, "gate", None) or getattr(block, "router", None),)
        if isinstance(router, nn.Module)
    )


class RoutingRecord:
    """The scores and choices of every router in one micro-batch."""

    def __init__(self, lengths: Int[Tensor, " B"], branches: Branches | None) -> None:
        self._lengths: list[int] = lengths.tolist()
        self._branches = branches
        self._outputs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._group: SequenceGroup | None = None

    @contextmanager
    def of(self, routers: Sequence[nn.Module], *, in_order: bool) -> Iterator[None]:
        """Record the one forward pass inside. in_order: keep the order of sequences, as needed by `balance_loss`."""
        hooks = [router.register_forward_hook(self._add) for router in routers]
        try:
            with in_row_order(in_order):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def loads(self) -> tuple[tuple[float, ...], ...]:
        """Return by layer how often each expert was chosen. The tokens of a shared prompt count once."""
        real = torch.ones(1, sum(self._lengths))
        return tuple(tuple(loads[0].tolist()) for loads, _ in self._sums(real))

    def balance_loss(self) -> Float[Tensor, ""]:
        """Return the sum of the sequences' balance losses, mean over layers. A sequence includes the prompt."""
        starts = [0, *itertools.accumulate(self._lengths)]
        members = torch.zeros(len(self._lengths), starts[-1])  # 1 where a token of the row belongs to the sequence
        for index, trunk in enumerate(trunks(self._lengths, self._branches)):
            for sequence, count in (*trunk, (index, self._lengths[index])):
                members[index, starts[sequence] : starts[sequence] + count] = 1.0
        return torch.stack([balance_loss(*sums).sum() for sums in self._sums(members)]).mean()

    def _add(self, router: nn.Module, inputs: Any, outputs: Any) -> None:
        """Record a router's scores of all experts and the chosen experts: a forward hook.

        The hook computes nothing, because a layer recomputed in the backward pass must repeat the same operations.
        """
        tensors = [value for value in outputs if torch.is_tensor(value)] if isinstance(outputs, tuple) else []
        chosen = [value for value in tensors if not value.is_floating_point() and value.ndim == 2]
        scores = [value for value in tensors if value.is_floating_point() and value.ndim == 2]
        if not chosen or not scores:
            raise UserError(
                f"{type(router).__name__} does not return the scores and the choices of its experts, so their load "
                "cannot be measured. Use another model."
            )
        self._group = current_group()
        widest = max(scores, key=lambda value: value.shape[-1])
        self._outputs.setdefault(router, []).append((widest, chosen[0]))

    def _sums(self, members: Float[Tensor, "B N"]) -> Iterator[tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]]:
        """Yield by layer each sequence's choices and summed scores of every expert."""
        for router, parts in self._outputs.items():
            logits, chosen = (torch.cat(values) for values in zip(*parts, strict=True))
            scores = scores_of(router, logits)
            if _has_sigmoids(router):
                scores = scores / scores.sum(-1, keepdim=True)
            choices = torch.zeros_like(scores).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
            with rows_shared_by(self._group):
                local = own_part(members.shape[1] + (-members.shape[1] % self._group.size if self._group else 0))
                table = members[:, local].to(scores)
                n = table.shape[1]  # a rank's part of the row may end with padding
                yield summed(table @ choices[:n]), summed(table @ scores[:n])


def scores_of(router: nn.Module, logits: Float[Tensor, "n E"]) -> Float[Tensor, "n E"]:
    """Return a router's scores of all experts: the softmax, or the sigmoids of most routers with a bias of choice."""
    return logits.float().sigmoid() if _has_sigmoids(router) else logits.float().softmax(-1)


def _has_sigmoids(router: nn.Module) -> bool:
    """Return whether a router scores by sigmoids. For some routers, the bias stands beside the router."""
    name = type(router).__name__
    return name in _SIGMOIDS or (hasattr(router, "e_score_correction_bias") and name not in _SOFTMAXES)
