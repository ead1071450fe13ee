"""Read the settings of an adapter folder as peft does, without running the folder's regular expressions."""

from __future__ import annotations

import math
import re
from pathlib import Path

import peft
from safetensors import SafetensorError, safe_open

from rlhf.errors import UserError
from rlhf.models.adapters.settings import read_adapter_settings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's file names
_ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")  # names in a file of weights
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


def load_adapter_config(folder: Path) -> peft.PeftConfig:
    """Return peft's config of an adapter folder. Raise UserError for a damaged folder.

    A regular expression in `target_modules` is replaced by the module names among the weights.
    """
    settings = read_adapter_settings(folder)
    path = folder / CONFIG
    alpha = settings.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{path}: lora_alpha is {alpha!r}, expected a number > 0. Download or copy the file again.")
    patterns = settings.get("layers_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not _PLAIN.fullmatch(pattern):
            raise UserError(
                f"{path}: layers_pattern has {pattern!r}, expected names of modules. Download or copy the file again."
            )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if isinstance(config, peft.LoraConfig) and isinstance(config.target_modules, str):
        config.target_modules = adapted_modules(folder)
    return config


def adapted_modules(folder: Path) -> set[str]:
    """Return the names of the modules with adapters among the weights of the folder."""
    matches = map(_ADAPTED.fullmatch, read_adapter_shapes(folder))
    return {match[1] for match in matches if match}


def refuse_no_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}: only adapters in the safetensors format are loaded. Save the adapter in this "
            "format."
        )


def read_adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights from the file's header. Raise UserError for a damaged file."""
    refuse_no_weights(folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): the file is damaged or incomplete. Download or copy it again."
        ) from error
