"""Trained adapters on disk, in peft's format: read, check against a base model, continue training, merge.

Nothing here is sharded: a worker loads an adapter before the engine takes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf.errors import UserError
from rlhf.models.adapters.config import CONFIG, WEIGHTS, load_adapter_config, read_adapter_shapes, refuse_no_weights
from rlhf.models.adapters.lora import inject, keep_initial, model_of, with_merged_adapter
from rlhf.models.adapters.settings import base_of
from rlhf.models.files.folder_check import refuse_broken_weights
from rlhf.models.files.loading import (
    architecture_fingerprint,
    has_score_head,
    load_model_config,
    load_scalar_model,
    no_reward_head,
    refuse_missing_weights,
    split_revision,
)
from rlhf.models.files.weights import saved_name

HEADS = ("score", "classifier")  # heads of scalar models; peft adds them to modules_to_save

# Settings allowed to differ from peft's defaults. Any other setting changes the adapter's result in an unsupported way.
_PLACES = {"layers_pattern", "layers_to_transform", "modules_to_save", "target_modules", "target_parameters"}
_SIZES = {"lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora"}
_ORIGIN = {"base_model_name_or_path", "init_lora_weights", "peft_version", "revision", "task_type"}
_KNOWN = _PLACES | _SIZES | _ORIGIN | {"ensure_weight_tying", "inference_mode"}
_LEAVES_BASE_ALONE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # inits with a plain LoRA as result


def read_adapter_config(folder: Path) -> peft.LoraConfig:
    """Return the config of an adapter folder. Raise UserError for an adapter that cannot be trained here."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is not an adapter folder, because it has no {CONFIG}. Name a folder that peft has saved."
        )
    refuse_no_weights(folder)
    config = load_adapter_config(folder)
    if type(config) is not peft.LoraConfig:
        raise UserError(f"{folder} is a {config.peft_type} adapter; only LoRA and its variants are supported.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _LEAVES_BASE_ALONE:
        raise UserError(
            f"{folder} was saved with init_lora_weights {init}, so it fits a base that this init has changed. Convert "
            "it to a plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    plain = peft.LoraConfig().to_dict()
    set_here = {key for key, value in config.to_dict().items() if value and value != plain.get(key)}
    if unsupported := sorted(set_here - _KNOWN):
        raise UserError(
            f"{folder} uses {', '.join(unsupported)}, which is not supported. Merge it into its base by peft."
        )
    config.init_lora_weights = True
    config.inference_mode = False
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in HEADS] or None
    return config


def read_adapter_shape(folder: Path) -> dict[str, Any]:
    """Return the keys of `lora` that a folder determines. Raise UserError as in `read_adapter_config`."""
    config = read_adapter_config(folder)
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
        "modules_to_save": tuple(config.modules_to_save or ()),  # a scalar head is not among them
        "target_parameters": tuple(config.target_parameters or ()),
    }


def refuse_misfit_adapter(folder: Path, base: str, *, scalar: bool = False, trust_remote_code: bool = False) -> None:
    """Raise UserError if the adapter does not fit the base, or the base with a scalar head. Reads only headers."""
    config = read_adapter_config(folder)
    architecture = load_model_config(base, trust_remote_code=trust_remote_code)
    trained_on = Path(config.base_model_name_or_path or "")
    if (trained_on / "config.json").is_file():
        other = load_model_config(str(trained_on), trust_remote_code=trust_remote_code)
        if architecture_fingerprint(other) != architecture_fingerprint(architecture):
            raise UserError(
                f"the adapter {folder} was trained on {trained_on}, a model of another architecture than {base}. "
                f"Name {trained_on} as the model, or an adapter of {base}."
            )
    with torch.device("meta"):
        model = _injected(model_of(architecture, scalar=scalar, trust_remote_code=trust_remote_code), folder, config)
    _refuse_other_shapes(folder, base, read_adapter_shapes(folder), _places(model), scalar=scalar)


def refuse_incomplete(folder: Path, base: str, *, trust_remote_code: bool = False) -> None:
    """Raise UserError if a language model's adapter lacks weights of adapted modules. Reads only headers."""
    config = load_adapter_config(folder)
    config.inference_mode = False  # in inference mode peft freezes the parameters listed by `_places`
    shapes = read_adapter_shapes(folder)
    architecture = load_model_config(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = _injected(model_of(architecture, trust_remote_code=trust_remote_code), folder, config)
    if missing := sorted(set(_places(model)) - set(shapes)):
        raise UserError(
            f"The adapter {folder} lacks {len(missing)} of its weights, which would be random: {missing[0]} and so on. "
            "Download or copy the adapter again, or name the model on which it was trained."
        )


def refuse_no_reward_adapter(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise UserError if an adapter is not of a model with one score, or does not fit the base. Reads only headers."""
    config = read_adapter_config(folder)
    if config.task_type != peft.TaskType.SEQ_CLS:
        raise no_reward_head(str(folder), f"LoRA adapter with task_type {config.task_type}")
    base, _ = base_of(folder)
    head = read_adapter_shapes(folder).get(saved_name("score.weight"))
    if head is None and not has_score_head(load_model_config(base, trust_remote_code=trust_remote_code)):
        raise no_reward_head(str(folder), f"LoRA adapter without a head, as is its base {base}")
    if head is not None and head[0] != 1:
        raise no_reward_head(str(folder), f"LoRA adapter with {head[0]} labels")
    refuse_broken_weights(Path(base))
    refuse_misfit_adapter(folder, base, scalar=True, trust_remote_code=trust_remote_code)
    refuse_missing_weights(base, scalar=True, trust_remote_code=trust_remote_code)


def load_trainable_adapter(model: Any, folder: Path, *, dropout: float = 0.0) -> Any:
    """Return the model with a trained adapter as the only trainable part, apart from a scalar head.

    A frozen copy of the adapter is kept: inside `adapter_disabled` the model is the base with the adapter as loaded. A
    scalar model takes only the weights of the model's modules. The adapter's config then names this model as the base.
    Raise UserError if the adapter does not fit.
    """
    config = read_adapter_config(folder)
    config.lora_dropout = dropout
    config.base_model_name_or_path, config.revision = split_revision(model.config._name_or_path)
    is_scalar = hasattr(model, "score")
    model = _injected(model, folder, config)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"The adapter {folder} holds NaN or infinite values in {name}. Download or copy the adapter again."
            )
    places = _places(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _refuse_other_shapes(folder, model.config._name_or_path, shapes, places, scalar=is_scalar)
    with torch.no_grad():
        for name in filter(tensors.__contains__, places):  # in order: tied weights have several names
            places[name].copy_(tensors[name])
    keep_initial(model, config)
    return model


def load_folded(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Return the scalar model of an adapter added to the base in float32, rounded to dtype."""
    base, _ = base_of(folder)
    model = load_scalar_model(base, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model = with_merged_adapter(model, str(folder))
    for parameter in model.parameters():  # buffers keep their dtype: some are float32 in a model of any dtype
        parameter.data = parameter.data.to(dtype)
    return model


def _injected(model: Any, folder: Path, config: peft.LoraConfig) -> Any:
    """Return the model with an untrained adapter of the folder's shape."""
    if hasattr(model, "score"):
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        config.modules_to_save = [name for name in config.modules_to_save or () if name in names] or None
        config.task_type = peft.TaskType.SEQ_CLS
    try:
        return inject(model, config)
    except ValueError as error:
        raise UserError(f"the adapter {folder} does not fit the model: {' '.join(str(error).split())}") from error


def _places(model: Any) -> dict[str, nn.Parameter]:
    """Map the names in an adapter file to the model's parameters."""
    return {saved_name(name): p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def _refuse_other_shapes(
    folder: Path, base: str, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, nn.Parameter], *, scalar: bool
) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in places.items()}
    low_rank = {name for name in wanted if ".lora_" in name}
    missing = (low_rank if scalar else set(wanted)) - set(shapes)  # a scalar model may have a head or lack one
    extra = {name for name in shapes if ".lora_" in name or not scalar} - set(wanted)
    for name in sorted(missing | extra):
        where = "the model has no such weight" if name in extra else "it is not in the file"
        raise UserError(
            f"the adapter {folder} does not fit {base}: {name}: {where}. Name the model on which the adapter was "
            "trained."
        )
    for name in sorted(set(wanted) & set(shapes)):
        if wanted[name] != shapes[name]:
            raise UserError(
                f"the adapter {folder} does not fit {base}: {name} has shape {list(shapes[name])}, but the model needs "
                f"{list(wanted[name])}. Name the model on which the adapter was trained."
            )
