"""One physical adapter, used by many clients' adapters in turns.

An adapter of rank r has the first r rows of each A and columns of each B in the slot of the largest rank. All further
rows and columns are zero, and so are all layers without the adapter. Zero rows of A beside zero columns of B have no
gradient, and Adam with weight decay leaves zeros: an adapter never grows beyond its rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf.adapters import AdapterShape
from rlhf.errors import UserError
from rlhf.models.files.weights import ADAPTER


class AdapterSlot:
    """The LoRA layers of a model from rlhf.models.adapters.lora.add_lora with plain LoRA on linear layers."""

    def __init__(self, model: Any) -> None:
        """Read the layers. Each is a part of the attention if it is below a module with `Attention` in its class."""
        self._model = model
        self.rank: int = model.peft_config[ADAPTER].r
        modules = dict(model.named_modules())
        self.all_layers: dict[str, Any] = {n: m for n, m in modules.items() if isinstance(m, LoraLayer)}
        attention = tuple(f"{n}." for n, m in modules.items() if "Attention" in type(m).__name__)
        self._in_attention = frozenset(name for name in self.all_layers if name.startswith(attention))

    def layers(self, shape: AdapterShape) -> dict[str, Any]:
        """Return the adapted layers by their paths. Raise UserError for a shape without a place in the slot."""
        if shape.trains_all:
            raise UserError(
                f"rank: is 0 or missing, so all weights would be trained, but this server trains adapters: set it to 1 "
                f"to {self.rank}. A server trains all weights with `policy: {{lora: null}}`."
            )
        if not 1 <= shape.rank <= self.rank:
            raise UserError(f"rank: is {shape.rank}, expected 1 to {self.rank}, policy.lora.rank of the server.")
        layers = {
            name: layer
            for name, layer in self.all_layers.items()
            if (shape.attention if name in self._in_attention else shape.mlp)
        }
        if not layers:
            raise UserError(
                "The adapter would adapt no layer of this model. Adapt the attention or the MLP layers (train_attn, "
                "train_mlp)."
            )
        return layers

    def initial(self, shape: AdapterShape) -> dict[str, Tensor]:
        """Return the initial weights by parameter, in the slot's rank. A is random as in peft, and B is zero."""
        generator = torch.Generator().manual_seed(shape.seed)
        weights: dict[str, Tensor] = {}
        for name, layer in self.layers(shape).items():
            bound = 1.0 / math.sqrt(layer.in_features)
            drawn = torch.empty(shape.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            weights[lora_parameter(name, "A")] = drawn
            weights[lora_parameter(name, "B")] = torch.zeros(layer.out_features, shape.rank)
        return self.padded(shape, weights)

    def padded(self, shape: AdapterShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values for all parameters of the slot, from values of the adapted layers in the adapter's rank."""
        values: dict[str, Tensor] = {}
        for name, layer in self.all_layers.items():
            a, b = torch.zeros(self.rank, layer.in_features), torch.zeros(layer.out_features, self.rank)
            if lora_parameter(name, "A") in weights:
                a[: shape.rank] = weights[lora_parameter(name, "A")]
                b[:, : shape.rank] = weights[lora_parameter(name, "B")]
            values |= {lora_parameter(name, "A"): a, lora_parameter(name, "B"): b}
        return values

    def trimmed(self, shape: AdapterShape, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of the adapted layers in the adapter's rank: the inverse of `padded`."""
        weights: dict[str, Tensor] = {}
        for name in self.layers(shape):
            weights[lora_parameter(name, "A")] = values[lora_parameter(name, "A")][: shape.rank].contiguous()
            weights[lora_parameter(name, "B")] = values[lora_parameter(name, "B")][:, : shape.rank].contiguous()
        return weights

    def scale(self, shape: AdapterShape) -> None:
        """Multiply the adapter's part of each layer by alpha / rank from now on."""
        for layer in self.all_layers.values():
            layer.scaling[ADAPTER] = shape.alpha / shape.rank

    def config(self, shape: AdapterShape) -> Any:
        """Return peft's config of an adapter, with names of layers, or paths where a name is of both kinds."""
        config = copy.deepcopy(self._model.peft_config[ADAPTER])
        adapted = self.layers(shape)
        linear = {n for n, m in self._model.named_modules() if isinstance(m, torch.nn.Linear | LoraLayer)}
        others = {name.rpartition(".")[2] for name in linear - adapted.keys()}  # also of a vision tower
        names = {name.rpartition(".")[2] for name in adapted}
        config.r, config.lora_alpha, config.inference_mode = shape.rank, shape.alpha, True
        config.target_modules = set(adapted) if names & others else names
        return config


def lora_parameter(layer: str, matrix: str) -> str:
    """Return the name of the parameter of a layer's A or B."""
    return f"{layer}.lora_{matrix}.{ADAPTER}.weight"
