"""What a reference says of a data set, on disk: computed once, taken up by every later run of the same two.

A file is named by its content: the reference's weights, and the tokens with their masks. It holds one number a token.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.types import Examples, TokenValues


def reference_key(architecture: str, named_weights: Iterable[tuple[str, Tensor]], examples: Examples) -> str:
    """The name: a hash of the model and of the data. Iterating the weights may be a collective."""
    digest = xxhash.xxh3_128(architecture.encode())
    for name, weight in named_weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for column in (examples.lengths, examples.token_ids, examples.loss_mask):
        digest.update(column.contiguous().numpy().data)
    return digest.hexdigest()


def write_columns(path: Path, columns: TokenValues) -> None:
    """Write the file aside and rename it: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{secrets.token_hex(8)}.tmp")  # another run may write the same one, on another host
    save_file({"logprobs": columns.values}, aside, metadata={"checksum": _checksum(columns.values)})
    aside.replace(path)


def read_columns(path: Path, examples: Examples) -> TokenValues | None:
    """The columns for these examples; None if the file is missing, cut or altered."""
    try:
        with safe_open(path, framework="pt") as file:
            values, checksum = file.get_tensor("logprobs"), file.metadata()["checksum"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    if values.shape != examples.token_ids.shape or _checksum(values) != checksum:
        return None
    return TokenValues(sequence_ids=examples.sequence_ids, lengths=examples.lengths, values=values)


def _checksum(values: Tensor) -> str:
    return xxhash.xxh3_128(values.contiguous().numpy().data).hexdigest()
