"""A frozen base of 4-bit weights under an adapter (QLoRA, arXiv:2305.14314), by bitsandbytes through transformers.

Linear layers but the head are stored as nf4 with quantised scales and multiplied in the model's dtype.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from rlhf.deferred import torch, transformers
from rlhf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Quantize = Literal["nf4"]
BLOCK = 64  # weights with a common scale


def refuse_unquantizable(key: str, architecture: Any, *, device: Literal["cpu", "cuda"]) -> None:
    """Raise UserError if a model of this config cannot be held in 4 bits here. `key` names the setting in the message.

    On a CPU bitsandbytes 0.50 dequantises a weight wrongly unless the rows are whole blocks of 64.
    """
    if getattr(architecture, "vision_config", None) is not None:
        raise UserError(
            f"{key}: is nf4, but no test has run with a vision model in 4 bits. Set it to null, and use a smaller "
            "model or more memory."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{key}: is nf4, but bitsandbytes, which stores weights in 4 bits, is not installed here. "
            "Run `pip install 'ray-rlhf[qlora]'`, or set it to null."
        )
    if device != "cpu":
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(architecture)
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    if uneven := sorted({layer.in_features for layer in layers if layer.in_features % BLOCK}):
        raise UserError(
            f"{key}: is nf4, but the model has linear layers {', '.join(map(str, uneven))} wide, and on a CPU "
            f"bitsandbytes needs a multiple of {BLOCK}. Use cluster.device cuda, another model, or set it to null."
        )


def quantization_options(
    quantize: Quantize | None, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """Return the options of from_pretrained for quantising weights on the device. dtype: of the products."""
    if quantize is None:
        return {}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(model: nn.Module) -> bool:
    """Return whether a weight of the model is stored in 4 bits."""
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters())


def keep_storage(model: nn.Module) -> None:
    """Keep the layers of 4-bit weights in training mode: otherwise bitsandbytes would reorder the weights on a CPU."""
    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.training = True


def dequantized(parameter: nn.Parameter) -> Tensor:
    """Return the parameter, dequantised if stored in 4 bits."""
    state = getattr(parameter, "quant_state", None)  # set by bitsandbytes on 4-bit parameters only
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(parameter.data, state)
    return weight
