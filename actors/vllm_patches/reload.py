"""Fix vLLM's reload of a running model, layer by layer. `ReloadEngine` calls the functions around a reload."""

from __future__ import annotations

from functools import partial

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


def num_constants(layer: torch.nn.Module) -> int:
    """Return the number of values in a layer's own buffers that are in no file. vLLM counts them as weights."""
    constants = layer._non_persistent_buffers_set
    return sum(buffer.numel() for name, buffer in layer.named_buffers(recurse=False) if name in constants)


def copied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers, gpt-oss's experts and sinks, with weights that vLLM copies unnoticed by the reload."""
    if type(model).__name__ != "GptOssForCausalLM":
        return []
    return [module for module in model.modules() if isinstance(module, RoutedExperts) or hasattr(module, "sinks")]


def forget_parts(model: torch.nn.Module) -> bool:
    """Forget the parts of layers received in a failed update. Return whether an update has failed."""
    begun = [info for module in model.modules() if (info := get_layerwise_info(module)).can_load()]
    for info in begun:
        info.load_numel = 0
        info.loaded_weights.clear()
    return bool(begun)


def name_loaders(model: torch.nn.Module) -> None:
    """Name the weight loaders that are partial functions, such as MiniMax-M2's. vLLM's reload reads their names."""
    for parameter in model.parameters():
        loader = getattr(parameter, "weight_loader", None)
        if isinstance(loader, partial):
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Make the next load build the expert kernels of a CPU again: vLLM packs the experts' weights only then."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def repack_heads(model: torch.nn.Module) -> None:
    """Pack the heads of a CPU again. A tied head loads nothing, so its packed copy would keep the old weights."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
