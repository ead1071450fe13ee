"""Hugging Face folders from a stream of weights: a model, or an adapter as peft writes it.

The last thing a run does, and what a checkpoint can become at any step. A folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.models.weights import ADAPTER

SHARD_BYTES = 5 * 10**9


def export_model(
    folder: Path,
    named_weights: Iterable[tuple[str, Tensor]],
    config: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    generation_config: Any | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A folder that from_pretrained loads: safetensors (several files above shard_bytes), config and tokenizer.

    A tied head is left out, as transformers expects. An existing folder is replaced.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.use_cache = True  # off while training
    name_padding(config, tokenizer)
    with appearing(folder) as partial:
        _write_shards(partial, ((name, weight.to(dtype)) for name, weight in named_weights), shard_bytes=shard_bytes)
        config.save_pretrained(partial)
        if generation_config is not None:
            generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def export_adapter(folder: Path, named_weights: Iterable[tuple[str, Tensor]], model: Any, tokenizer: Any) -> None:
    """A folder that peft (and vLLM) loads onto the base model. `named_weights` under the names that peft saves."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    with appearing(folder) as partial:
        weights = {name: _owned(weight) for name, weight in named_weights}
        save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def adapter_config(model: Any) -> dict[str, Any]:
    """adapter_config.json of a model's adapter, as plain values."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        values: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return values


def name_padding(config: Any, tokenizer: Any) -> None:
    """Give a model's config the tokenizer's padding if it names none, without which a scalar head scores no batch."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:  # some kinds lack it
        text.pad_token_id = tokenizer.pad_token_id


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, renamed to it at the end, removed if anything fails."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_shards(folder: Path, named_weights: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> None:
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def close_shard() -> None:
        save_file(shard, folder / f"shard-{len(names)}", metadata={"format": "pt"})
        names.append(list(shard))
        shard.clear()

    for name, weight in named_weights:
        nbytes = weight.numel() * weight.element_size()
        if shard and size + nbytes > shard_bytes:
            close_shard()
            size = 0
        shard[name] = _owned(weight)
        size += nbytes
        total += nbytes
    close_shard()
    if len(names) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    file_of: dict[str, str] = {}
    for index, in_shard in enumerate(names):
        file = f"model-{index + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        file_of.update(dict.fromkeys(in_shard, file))
    table = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=2))


def _owned(weight: Tensor) -> Tensor:
    """A copy on the host: the stream may reuse its memory for the next weight."""
    return weight.detach().to("cpu", copy=True).contiguous()
