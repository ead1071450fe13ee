"""Several adapters of one base model in one pass: each token of a row passes through the adapter of its own client.

The matrices of the adapters stand side by side, in a common A of all ranks' rows and a common B of all ranks' columns.
Between the two products a token keeps only the values of its own adapter, times alpha / rank of the adapter.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.adapters import AdapterShape
from rlhf.models.adapters.slot import AdapterSlot, lora_parameter
from rlhf.models.files.weights import ADAPTER


class AdapterStack:
    """Adapters by their numbers 0, 1, ... in the layers of a slot. The gradient is only of the stack."""

    def __init__(
        self,
        slot: AdapterSlot,
        adapters: Sequence[tuple[AdapterShape, Mapping[str, Tensor]]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Copy the weights, which are by parameter in the slot's rank, as in AdapterSlot.padded."""
        self._shapes = [shape for shape, _ in adapters]
        self._wide = torch.promote_types(dtype, torch.float32)  # alpha / rank may have no exact value in bfloat16
        self._factors: dict[tuple[int, ...], Tensor] = {}  # of the running pass, by the numbers of a layer's adapters
        self._layers = slot.all_layers
        self._members = {
            name: tuple(i for i, shape in enumerate(self._shapes) if name in slot.layers(shape))
            for name in self._layers
        }
        self._stacked: dict[str, tuple[Any, Any]] = {}  # A and B of the layers with an adapter
        for name, members in self._members.items():
            if members:
                a, b = (
                    torch.cat(
                        [
                            adapters[i][1][lora_parameter(name, matrix)].narrow(dim, 0, self._shapes[i].rank)
                            for i in members
                        ],
                        dim=dim,
                    ).to(dtype=dtype, device=device)
                    for dim, matrix in enumerate("AB")
                )
                layer = self._layers[name]
                self._stacked[name] = _linear_like(layer.lora_A[ADAPTER], a), _linear_like(layer.lora_B[ADAPTER], b)
                self._stacked[name][1].register_forward_pre_hook(partial(self._kept, members))

    @contextmanager
    def computing(self, owners: Int[Tensor, " N"]) -> Iterator[None]:
        """Use the adapters in the block for a row of N tokens, also in its backward pass. `owners`: of the tokens."""
        self._factors = {some: self._of_tokens(some, owners) for some in set(self._members.values()) if some}
        before = {}
        try:
            for name, layer in self._layers.items():
                before[name] = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER])
                if name in self._stacked:
                    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = self._stacked[name]
                    layer.scaling[ADAPTER] = 1.0
                else:
                    layer._disable_adapters = True
            yield
        finally:
            for name, (a, b, scaling) in before.items():
                layer = self._layers[name]
                layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER] = a, b, scaling
                layer._disable_adapters = False

    def has_finite_gradient(self) -> bool:
        gradients = (module.weight.grad for pair in self._stacked.values() for module in pair)
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    def gradient(self, number: int) -> dict[str, Tensor]:
        """Return the gradient of an adapter by parameter, in the adapter's own rank. Empty before a backward pass."""
        found: dict[str, Tensor] = {}
        for name, (a, b) in self._stacked.items():
            members = self._members[name]
            if number in members and a.weight.grad is not None and b.weight.grad is not None:
                place, ranks = members.index(number), [self._shapes[i].rank for i in members]
                found[lora_parameter(name, "A")] = a.weight.grad.split(ranks)[place]
                found[lora_parameter(name, "B")] = b.weight.grad.split(ranks, dim=1)[place]
        return found

    def _of_tokens(self, members: Sequence[int], owners: Int[Tensor, " N"]) -> Float[Tensor, "N R"]:
        """Return alpha / rank at the places of each token's own adapter, and 0 elsewhere."""
        shapes = [self._shapes[i] for i in members]
        ranks = torch.tensor([shape.rank for shape in shapes])
        columns = torch.tensor(members).repeat_interleave(ranks).to(owners.device)
        scales = torch.tensor([shape.alpha / shape.rank for shape in shapes], dtype=self._wide)
        return (owners[:, None] == columns) * scales.repeat_interleave(ranks).to(owners.device)

    def _kept(self, members: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Keep of the values between A and B, [1, N, R], each token's own."""
        return ((inputs[0] * self._factors[members]).to(inputs[0].dtype),)


def _linear_like(module: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a linear layer of the module's class with another weight."""
    made = copy.copy(module)
    made._parameters, made._forward_pre_hooks = {"weight": nn.Parameter(weight), "bias": None}, OrderedDict()
    return made
