"""Cache of a reference's log-probabilities on disk. Later runs with the same model and data reuse the cache.

A file is named by a hash of the reference's weights, the tokens and the masks. The file holds a number per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.tracking.run_folder.atomic import write_aside
from rlhf.types import Examples, TokenValues


def reference_key(architecture: str, named_weights: Iterable[tuple[str, Tensor]], examples: Examples) -> str:
    """Return the file's name: a hash of the model and of the data. Iterating over the weights may be collective."""
    digest = xxhash.xxh3_128(architecture.encode())
    for name, weight in named_weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for column in (examples.lengths, examples.token_ids, examples.loss_mask):
        digest.update(column.contiguous().numpy().data)
    return digest.hexdigest()


def write_columns(path: Path, columns: TokenValues) -> None:
    """Write a temporary file, and rename the file. Readers see the complete file or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content, metadata = {"logprobs": columns.values}, {"checksum": _checksum(columns.values)}
    write_aside(path, lambda aside: save_file(content, aside, metadata=metadata), needed=columns.values.nbytes)


def read_columns(path: Path, examples: Examples) -> TokenValues | None:
    """Return the columns of the examples. None: the file is missing, truncated or altered."""
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
