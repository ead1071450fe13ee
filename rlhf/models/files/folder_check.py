"""Check a model folder before transformers reads it: kinds of files, sizes in config.json, headers.

A folder may come from anywhere. Nothing here loads weights or builds a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.errors import UserError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # each model has one of these names; 0: dense
# Largest sizes of any known model, with room. Building a larger config.json would take hours or all memory.
_MOST = {
    **dict.fromkeys(_EXPERTS, 10**4),
    "hidden_size": 10**6,
    "num_attention_heads": 10**4,
    "num_hidden_layers": 10**3,
    "num_key_value_heads": 10**4,
    "vocab_size": 10**7,
}
_SMALL_FILES = {"config.json": 2**22, "chat_template.jinja": 2**20, "tokenizer_config.json": 2**26}  # most bytes


def refuse_strange_folder(folder: Path) -> None:
    """Raise UserError if a model folder holds special files, or if config.json names impossible sizes."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(
                f"{path} is neither a file nor a folder, so it cannot be part of a model. Remove this entry from the "
                "folder."
            )
        most = _SMALL_FILES.get(path.name)
        if most is not None and path.is_file() and path.stat().st_size > most:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, expected at most {most:,}. Download or copy the file again."
            )
    path = folder / "config.json"
    if not path.is_file():
        return
    for where, values in _sections(read_json_object(path)):
        for key, most in _MOST.items():
            value, least = values.get(key), 0 if key in _EXPERTS else 1
            if isinstance(value, int | float) and not least <= value <= most:
                raise UserError(
                    f"{path}: {where}{key} is {value}, expected an integer from {least} to {most:,}. Download or copy "
                    "the file again."
                )


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts in a layer of a mixture, from the values of config.json. 0: a dense model."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return next((int(text[key]) for key in _EXPERTS if text.get(key)), 0)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file of a model. Raise UserError for any other content than a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({type(error).__name__}: {error}). Download or copy the file again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds a JSON {type(values).__name__}, expected an object. Download or copy the file again."
        )
    return values


def refuse_broken_weights(folder: Path) -> None:
    """Raise UserError if a local model has no weights or a damaged file of weights. Reads only headers."""
    if not folder.is_dir():
        return
    refuse_strange_folder(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(
                f"{index}: weight_map must map names of weights to names of files. Download or copy the file again."
            )
        files = [folder / name for name in sorted(set(places.values()))]
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"the weights in {folder} cannot be read ({error}): a file is damaged, incomplete or missing. Download or "
            "copy the model again."
        ) from error
    if not files:
        raise UserError(
            f"{folder} has no weights: no file ends in .safetensors, and no other format is loaded. Download or copy "
            "the model again."
        )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config and its sections for submodels, each with a prefix."""
    yield "", config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield f"{key}.", value
