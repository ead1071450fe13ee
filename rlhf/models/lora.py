"""Low-rank adapters (arXiv:2106.09685) through peft, put into the model itself: its class and calls stay as they are.

Workers add one after loading. The frozen weights are never changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rlhf.errors import UserError
from rlhf.models.weights import ADAPTER


def add_lora(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: str | Sequence[str] = "all-linear"
) -> Any:
    """The model with an adapter that is its only trainable part, besides a scalar head. It starts as the identity.

    `target_modules`: names of linear layers, or "all-linear" for all but the head. UserError if one does not exist.
    """
    is_scalar = hasattr(model, "score")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        task_type=peft.TaskType.SEQ_CLS if is_scalar else peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=model.config._name_or_path,
    )
    try:
        model = peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from error
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not isinstance(target_modules, str) and (missing := set(target_modules) - layers):
        raise UserError(f"lora.target_modules: the model has no linear layers named {', '.join(sorted(missing))}.")
    config.target_modules = layers
    if is_scalar:
        model.score.requires_grad_(True)
        config.modules_to_save = ["score"]
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside. What stays trainable is not touched, as peft's own switch would."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def starts_as_identity(model: nn.Module) -> bool:
    """Whether the adapter changes nothing yet (B = 0 everywhere), so that the model without it is the initial policy.

    Ask before the engine shards the weights.
    """
    with torch.no_grad():
        return not any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)


def with_adapter(model: Any, folder: str) -> Any:
    """The model with the adapter of a folder in it, to be used as it is. UserError if the adapter does not fit."""
    try:
        adapted: Any = peft.PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the adapter in {folder} cannot be put on its base model: {' '.join(str(error).split())}"
        ) from error
    return adapted.get_base_model()
