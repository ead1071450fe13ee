"""Files of named tensors and plain values: safetensors, with the values as JSON in the metadata.

Reading a file runs no code. The tensors are written in parts, so that a state on a GPU needs no second copy on the
host.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.errors import RunError, UserError
from rlhf.tracking.run_folder.atomic import write_aside

_VALUES = "values"  # in the metadata
_PART_BYTES = 64 * 2**20
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a file whole or not at all. Wait for room on a full disk. RunError: a value is not plain (`to_json`)."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each tensor is aligned
    header: dict[str, Any] = {"__metadata__": {_VALUES: to_json(values)}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise RunError(f"{path} cannot hold {name}, a tensor of {tensor.dtype}.")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, tensor in ordered:
                for part in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_PART_BYTES):
                    file.write(part.cpu().numpy().data)
            file.flush()
            os.fsync(file.fileno())  # NFS reports a full disk only now

    write_aside(path, write, needed=8 + len(encoded) + end)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and values. The tensors stay on the disk until their use. UserError: missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(json.loads(file.metadata()[_VALUES]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {str(error)[:200].rstrip('.')}"
    text = f"{path} cannot be read: {reason}. Restore the file from a copy, or resume from an earlier checkpoint."
    return UserError(text)


def to_json(value: Any) -> str:
    """Return a value as JSON. Raise RunError unless JSON returns the same value."""
    _refuse_unplain(value, "values")
    return json.dumps(value)


def _refuse_unplain(value: Any, place: str) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unplain(item, f"{place}[{index}]")
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _refuse_unplain(item, f"{place}[{key!r}]")
    elif not (value is None or (isinstance(value, str | int | float) and value == value)):  # nan differs from itself
        raise RunError(
            f"The state of this rank cannot be saved: {place} is {str(value)[:100]}, of type {type(value).__name__}. "
            "A file holds tensors, and as values only null, true, false, numbers, text, lists, and mappings from text."
        )
