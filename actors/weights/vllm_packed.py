"""Loads weights into a CPU engine in one pass: each matrix is packed directly from the received memory.

vLLM's general reload copies the weights twice. Here q, k, v are adjacent in the flat run, as are gate and up, so the
fused matrix is a view of the run. The method works only for plain decoders on a single CPU worker. The loading of the
model may only rename and fuse weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rlhf.errors import RunError

PLAIN_DECODERS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


def loads_packed(model: nn.Module, *, device: torch.device, num_workers: int) -> bool:
    """Return whether `load_packed` knows this model."""
    if device.type != "cpu" or num_workers != 1 or type(model).__name__ not in PLAIN_DECODERS:
        return False
    methods = [module.quant_method for module in model.modules() if isinstance(module, LinearBase)]
    return all(isinstance(method, UnquantizedLinearMethod) for method in methods)


def load_packed(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Load all weights but a tied head, by Hugging Face name. RunError for missing, unknown or misshapen weights."""
    parts_of: Mapping[str, Sequence[str]] = model.packed_modules_mapping
    unused = dict(weights)
    for name, parameter in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        prefix, dot, leaf = module_name.rpartition(".")  # such as model.layers.0.mlp and gate_up_proj
        sources = [f"{prefix}{dot}{part}.{kind}" for part in parts_of.get(leaf, (leaf,))]
        missing = [source for source in sources if source not in unused]
        if missing:
            raise RunError(
                f"weight sync: the engine's {name} needs {missing[0]}, but the policy did not publish this weight"
            )
        weight = joined([unused.pop(source) for source in sources])
        module = model.get_submodule(module_name)
        if isinstance(module, LinearBase) and kind == "weight":
            _pack(module, parameter, weight)
        elif isinstance(module, VocabParallelEmbedding):  # or the head; the engine pads its vocabulary
            parameter.data[: len(weight)].copy_(weight)
        else:
            parameter.data.copy_(weight)
    if unused:
        raise RunError(f"weight sync: {next(iter(unused))} was published, but the engine has no such weight")


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts stacked: a view for parts adjacent in memory, else a copy."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel() * part.element_size()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _pack(module: Any, parameter: nn.Parameter, weight: Tensor) -> None:
    """Create the layer's packed weight. The parameter stays: empty, or (for kernels without packing) a copy."""
    if weight.shape != (module.output_size, module.input_size):
        raise RunError(
            f"weight sync: {module.prefix} has the shape {(module.output_size, module.input_size)} in the engine and "
            f"{tuple(weight.shape)} in the policy"
        )
    if parameter.numel():
        parameter.data.copy_(weight)
        module.quant_method.process_weights_after_loading(module)
        return
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.quant_method.process_weights_after_loading(module)
    module.weight = parameter
