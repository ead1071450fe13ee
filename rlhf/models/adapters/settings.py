"""Read the settings of a LoRA adapter from adapter_config.json, without loading peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.models.files.folder_check import read_json_object
from rlhf.models.files.loading import ADAPTER_CONFIG, with_revision


def base_of(folder: Path) -> tuple[str, int]:
    """Return the base model of an adapter's folder, as NAME@REVISION if revised, and the adapter's rank."""
    path = folder / ADAPTER_CONFIG
    config = read_adapter_settings(folder)
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: is an adapter of type {config['peft_type']}; only LORA is supported here.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path}: base_model_name_or_path is {base!r}, so the base model is unknown. Write the name of the base "
            "model there."
        )
    return with_revision(base, config.get("revision")), max(_ranks(config).values())


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the values in adapter_config.json. UserError for a damaged file, or a rank that is no positive integer."""
    path = folder / ADAPTER_CONFIG
    settings = read_json_object(path)
    if not isinstance(settings.get("peft_type"), str):
        raise UserError(
            f"{path} is not the configuration of an adapter, because it names no peft_type. Download or copy the file "
            "again."
        )
    if settings["peft_type"] == "LORA":
        for key, rank in _ranks(settings).items():
            if type(rank) is not int or rank < 1:
                raise UserError(
                    f"{path}: the rank {key} is {rank!r}, expected an integer >= 1. Download or copy the file again."
                )
    return settings


def _ranks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rank of the adapter and the ranks of single layers, by key."""
    pattern = settings.get("rank_pattern") or {}
    return {"r": settings.get("r"), **(pattern if isinstance(pattern, dict) else {"rank_pattern": pattern})}
