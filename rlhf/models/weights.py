"""A model's weights as others want them: under their Hugging Face names, whole, adapters merged or apart.

Read by weight sync and export through the engine, which gathers the parameters that each weight is made from. Nothing
here knows how parameters are sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the one adapter of a model
_PEFT_PREFIX = "base_model.model."  # of every name in an adapter file, as peft saves it


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One published weight and the parameters it is made from: itself, or a frozen weight and its LoRA pair."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lora_scaling: float | None = None  # None: the weight is its one parameter

    def make(self) -> Tensor:
        """The weight, once its parameters are whole: W, or W + scaling * B A (arXiv:2106.09685, section 4.1)."""
        weight = self.parameters[0].detach()
        if self.lora_scaling is None:
            return weight
        lora_a, lora_b = (p.detach() for p in self.parameters[1:])
        return weight + self.lora_scaling * (lora_b @ lora_a).to(weight.dtype)


def weight_sources(model: nn.Module) -> list[WeightSource]:
    """All weights of the model, adapters merged. A tied weight comes once, under the name of the embedding."""
    pairs = {
        f"{name}.base_layer.weight": module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    sources = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        module: Any = pairs.get(name)
        parts: tuple[nn.Parameter, ...] = (parameter,)
        scaling = None
        if module is not None:
            parts += (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
            scaling = float(module.scaling[ADAPTER])
        sources.append(WeightSource(name.replace(".base_layer.", "."), parts, scaling))
    return sources


def adapter_sources(model: nn.Module) -> list[WeightSource]:
    """What is trained of a LoRA model, under the names in peft's adapter_model.safetensors.

    That is the adapter, and a scalar head if there is one. ValueError if the model has no adapter.
    """
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("the model has no LoRA adapter")
    return [
        WeightSource(_PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."), (parameter,))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
