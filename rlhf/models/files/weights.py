"""A model's weights for other programs: under the Hugging Face names, whole, adapters merged or separate.

The engine gathers the parameters of each weight. Nothing here knows how parameters are sharded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from rlhf.models.files.hub_names import HubNames
from rlhf.models.quantized import dequantized
from rlhf.vision.kinds import is_vision_weight

ADAPTER = "default"  # peft's name for the adapter of a model
INITIAL = "initial"  # name of the frozen copy of an initial adapter other than the identity
_PEFT_PREFIX = "base_model.model."  # prefix of every name in peft's adapter files


def _itself(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A weight of the model as a combination of parameters: one parameter, or a frozen weight and an adapter."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    combine: Callable[..., Tensor] = _itself
    hub_names: HubNames | None = None  # None: published unchanged

    def make(self) -> Tensor:
        """Return the weight from whole parameters. A 4-bit weight is dequantised."""
        return self.combine(*(dequantized(p).detach() for p in self.parameters))

    def published(self) -> Iterable[tuple[str, Tensor]]:
        """Return the weight under the names of the model's files, with a separate weight for each expert of a stack."""
        weight = self.make()
        return ((self.name, weight),) if self.hub_names is None else self.hub_names.convert(self.name, weight).items()


def lora_merged(
    weight: Float[Tensor, "o i"], lora_a: Float[Tensor, "r i"], lora_b: Float[Tensor, "o r"], *, scaling: float
) -> Float[Tensor, "o i"]:
    """Return W + scaling * B A (arXiv:2106.09685, section 4.1), the update rounded to W's dtype before, as in peft."""
    return weight + _update(lora_a, lora_b, scaling).to(weight.dtype)


def stack_merged(
    weight: Float[Tensor, "E m n"],
    lora_a: Float[Tensor, "rE i"],
    lora_b: Float[Tensor, "o rE"],
    *,
    scaling: float,
    transposed: bool,
) -> Float[Tensor, "E m n"]:
    """Return W + scaling * B A for each expert of a stack, in peft's layout. transposed: of a stack of transposed W."""
    rows = lora_a.reshape(len(weight), -1, lora_a.shape[1])
    columns = lora_b.reshape(lora_b.shape[0], -1, len(weight)).permute(2, 0, 1)
    update = _update(rows, columns, scaling).to(weight.dtype)
    return weight + (update.transpose(1, 2) if transposed else update)


def dora_merged(
    weight: Float[Tensor, "o i"],
    lora_a: Float[Tensor, "r i"],
    lora_b: Float[Tensor, "o r"],
    magnitude: Float[Tensor, " o"],
    *,
    scaling: float,
) -> Float[Tensor, "o i"]:
    """Return m * V / ||V|| with V = W + scaling * B A and norms over each output's row (arXiv:2402.09353, eq. 5)."""
    direction = weight + _update(lora_a, lora_b, scaling)
    norm: Tensor = torch.linalg.norm(direction, dim=1).to(direction.dtype)
    return ((magnitude / norm)[:, None] * direction).to(weight.dtype)


def pissa_merged(
    weight: Float[Tensor, "o i"],
    lora_a: Float[Tensor, "r i"],
    lora_b: Float[Tensor, "o r"],
    initial_a: Float[Tensor, "r i"],
    initial_b: Float[Tensor, "o r"],
    *,
    scaling: float,
) -> Float[Tensor, "o i"]:
    """Return W + scaling * (B A - B0 A0): W with the change of the principal part in training (arXiv:2404.02948)."""
    return lora_merged(weight, pissa_rows(lora_a, initial_a), pissa_columns(lora_b, initial_b), scaling=scaling)


def pissa_rows(lora_a: Float[Tensor, "r i"], initial_a: Float[Tensor, "r i"]) -> Float[Tensor, "two_r i"]:
    """Return A of the plain adapter of twice the rank, equal to B A - B0 A0."""
    return torch.cat([lora_a, initial_a])


def pissa_columns(lora_b: Float[Tensor, "o r"], initial_b: Float[Tensor, "o r"]) -> Float[Tensor, "o two_r"]:
    """Return B of the plain adapter of twice the rank, equal to B A - B0 A0."""
    return torch.cat([lora_b, -initial_b], dim=1)


def _update(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return scaling * B A in the adapter's dtype. On a CPU the product of bfloat16 is taken in float32."""
    if lora_b.device.type == "cpu":
        return ((lora_b.float() @ lora_a.float()) * scaling).to(lora_b.dtype)
    return (lora_b @ lora_a) * scaling


def is_initial_copy(name: str) -> bool:
    """Return whether a parameter of this name is a frozen copy of an initial adapter."""
    return f".{INITIAL}." in name


def initial_copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen copies of the model's initial adapter, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_initial_copy(name)}


def weight_sources(model: nn.Module) -> list[WeightSource]:
    """Return all weights of the model, adapters merged. A tied weight comes once, under the embedding's name.

    Buffers in the model's files are weights too, such as the bias of DeepSeek's routers.
    """
    layers, whole = _adapted_modules(model)
    stacks = {id(layer.get_param()): layer for layer in layers.values() if is_stack(layer)}
    hub_names = HubNames(model)
    replaced = tuple(f"{name}.original_module." for name in whole)
    sources = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name or is_initial_copy(name) or name.startswith(replaced):
            continue
        owner, _, part = name.partition(".base_layer.")
        layer = stacks.get(id(parameter)) or (layers[owner] if part == "weight" else None)
        parts, merge = ((), _itself) if layer is None else (_parts_of(layer), _merge_of(layer))
        sources.append(WeightSource(_plain(name), (parameter, *parts), merge, hub_names))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set and not name.startswith(replaced):
                sources.append(WeightSource(_plain(name), (), partial(_itself, buffer), hub_names))
    return sources


def sources_without_tower(model: nn.Module) -> list[WeightSource]:
    """Return all weights of the model but those of a frozen vision tower and projector. A trained part keeps all."""
    sources = weight_sources(model)
    if any(weight.requires_grad for name, weight in model.named_parameters() if is_vision_weight(name)):
        return sources
    return [source for source in sources if not is_vision_weight(source.name)]


def published_names(config: Any) -> frozenset[str]:
    """Return the names of all weights in the files of a model of this config. Empty: unknown to transformers."""
    sees = getattr(config, "vision_config", None) is not None
    known = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        return frozenset()
    with torch.device("meta"):
        model = known[type(config)](config)
    return frozenset(name for source in weight_sources(model) for name, _ in source.published())


def adapter_sources(model: nn.Module) -> list[WeightSource]:
    """Return the trained weights of a LoRA model, under the names in peft's adapter_model.safetensors.

    The trained weights are the adapter, the modules trained whole, and any scalar head. A PiSSA adapter comes as a
    plain adapter of twice the rank, for the unchanged base. Raise ValueError if the model has no adapter.
    """
    layers, _ = _adapted_modules(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter")
    sources = []
    for name, parameter in model.named_parameters(remove_duplicate=False):  # peft stores a tied head separately
        if not parameter.requires_grad:
            continue
        owner, _, part = name.partition(".lora_")
        layer = layers.get(owner) if part else None
        if layer is None or not is_pissa(layer):
            sources.append(WeightSource(saved_name(name), (parameter,)))
        else:
            initial, join = (layer.lora_A, pissa_rows) if part.startswith("A.") else (layer.lora_B, pissa_columns)
            sources.append(WeightSource(saved_name(name), (parameter, initial[INITIAL].weight), join))
    return sources


def saved_name(name: str) -> str:
    """Return the name of a trainable parameter of an adapted model in peft's adapter_model.safetensors."""
    name = _saved_whole(name).replace(f".{ADAPTER}.", ".")
    return _PEFT_PREFIX + name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def is_stack(layer: Any) -> bool:
    """Return whether an adapted layer is a stack of experts, one parameter of the module."""
    return hasattr(layer, "parameter_name")


def is_pissa(layer: Any) -> bool:
    """Return whether the layer's initial adapter is subtracted, as in PiSSA: the base stays unchanged."""
    return bool(layer.scaling.get(INITIAL, 0.0) < 0.0)


def _adapted_modules(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Return the layers with adapters by name, and the names of the modules trained whole."""
    if not hasattr(model, "peft_config"):
        return {}, []
    from peft.tuners.lora import LoraLayer  # the import takes seconds
    from peft.utils.other import ModulesToSaveWrapper

    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    return layers, [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]


def _parts_of(layer: Any) -> tuple[nn.Parameter, ...]:
    names = (ADAPTER, INITIAL) if is_pissa(layer) else (ADAPTER,)
    pairs = tuple(matrix[name].weight for name in names for matrix in (layer.lora_A, layer.lora_B))
    magnitudes = layer.lora_magnitude_vector
    return (*pairs, magnitudes[ADAPTER].weight) if ADAPTER in magnitudes else pairs


def _merge_of(layer: Any) -> Callable[..., Tensor]:
    if is_stack(layer):
        transposed = not layer._did_swap_in_out_features
        return partial(stack_merged, scaling=float(layer.scaling[ADAPTER]), transposed=transposed)
    merge = dora_merged if ADAPTER in layer.lora_magnitude_vector else pissa_merged if is_pissa(layer) else lora_merged
    return partial(merge, scaling=float(layer.scaling[ADAPTER]))


def _plain(name: str) -> str:
    """Return a parameter's name in the model without peft's layers."""
    return re.sub(r"(\.base_layer)+\.", ".", _saved_whole(name))


def _saved_whole(name: str) -> str:
    """Return a parameter's name without peft's wrapper of modules trained whole."""
    return name.replace(f".modules_to_save.{ADAPTER}.", ".")
