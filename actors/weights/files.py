"""The transport of whole weights by files: an exported model folder, read by engines at any later time.

The checksum covers all bytes of all files with weights. Both ends take the checksum of mapped files, and an engine
loads the weights from the same mapped memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from actors.weights.checksum import Checksum
from actors.weights.manifest import tensor_view
from rlhf.errors import RunError

FILES: Literal["files"] = "files"  # name of the transport
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its table
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def mapped_files(folder: Path) -> list[UInt8[Tensor, " bytes"]]:
    """Return the files with a model's weights, mapped into memory. RunError: there are none, or one cannot be read."""
    paths = sorted(folder.glob("*.safetensors"))
    try:
        files = [torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in paths]
    except (OSError, RuntimeError) as error:
        raise RunError(f"The weights in {folder} cannot be read: {error}") from error
    if not files:
        raise RunError(f"There is no file of weights in {folder}.")
    return files


def files_checksum(files: list[UInt8[Tensor, " bytes"]]) -> str:
    checksum = Checksum()
    for file in files:
        checksum.add(file)
    return checksum.hexdigest()


def weights_in(file: UInt8[Tensor, " bytes"]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a mapped safetensors file, as views of the file."""
    begin = _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES].numpy().tobytes(), "little")
    table = json.loads(file[_LENGTH_BYTES:begin].numpy().tobytes())
    table.pop("__metadata__", None)
    for name, entry in table.items():
        yield name, tensor_view(file, begin + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"])
