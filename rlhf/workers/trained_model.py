"""The model of a trained role, with any adapter: loaded for a rank or an export, and written as a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.derive import adapter_options, chat_template
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.models.files.export import export_adapter, export_model
from rlhf.models.files.loading import load_tokenizer
from rlhf.vision.kinds import is_vision_weight
from rlhf.workers.model_worker import torch_dtype


def load_trained_model(model: PolicyConfig | CriticConfig, load_model: Callable[..., Any], device: torch.device) -> Any:
    """Load the model of a section, with any new or trained adapter. `device` is only for quantized weights."""
    lora = model.lora
    module = load_model(
        model.model,
        dtype=torch_dtype(model.dtype),
        trust_remote_code=model.trust_remote_code,
        gradient_checkpointing=model.gradient_checkpointing,
        quantize=None if lora is None else lora.quantize,
        device=device,
    )
    if lora is None:
        if model.vision_lr is None:
            freeze_vision(module)
        return module
    from rlhf.models.adapters.folder import load_trainable_adapter  # with peft, which takes seconds
    from rlhf.models.adapters.lora import add_lora

    if model.adapter is not None:
        return load_trainable_adapter(module, Path(model.adapter), dropout=lora.dropout)
    return add_lora(module, **adapter_options(lora, vision_lr=model.vision_lr))


def freeze_vision(module: torch.nn.Module) -> None:
    """Leave the vision tower and the projector of a model out of training."""
    for name, parameter in module.named_parameters():
        if is_vision_weight(name):
            parameter.requires_grad_(False)


def load_policy_tokenizer(config: Config) -> Any:
    """Load the tokenizer of a run's policy, with the run's chat template."""
    policy, template = config.policy, chat_template(config)
    return load_tokenizer(policy.tokenizer_source, trust_remote_code=policy.trust_remote_code, template=template)


def write_model_folder(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    module: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    adapter_alone: bool,
) -> None:
    """Write a Hugging Face folder of the weights, or an adapter folder for peft and vLLM."""
    if adapter_alone:
        export_adapter(folder, weights, module, tokenizer)
    else:
        export_model(folder, weights, module, tokenizer, dtype=dtype)
