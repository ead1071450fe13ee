"""Write Hugging Face folders from a stream of weights: a model, or an adapter in peft's format.

A run ends with an export, and `rlhf export` exports a checkpoint. A folder appears complete or not at all.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from rlhf.models.files.hub_names import missing_settings
from rlhf.models.files.loading import has_score_head
from rlhf.models.files.weights import ADAPTER
from rlhf.models.packed.images import image_reader
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.atomic import make_folder, write_aside, write_atomic

_log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9


def export_model(
    folder: Path,
    named_weights: Iterable[tuple[str, Tensor]],
    model: Any,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder for from_pretrained: safetensors (several files above shard_bytes), configs, tokenizer, any code.

    A vision model's folder has the settings of its image processor too.

    A tied head is left out, as transformers expects. An existing folder is replaced. dtype: of the weights.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.use_cache = True  # off while training
    config.update(missing_settings(config))
    name_padding(config, tokenizer)
    reader = image_reader(model)
    with appearing(folder) as partial:
        _write_shards(partial, named_weights, shard_bytes=shard_bytes)
        when_there_is_room(partial, lambda: _save_model_settings(partial, model, config, tokenizer))
        if reader is not None:
            when_there_is_room(partial, lambda: reader.processing.save(partial))


def export_adapter(folder: Path, named_weights: Iterable[tuple[str, Tensor]], model: Any, tokenizer: Any) -> None:
    """Write an adapter folder for peft and vLLM. `named_weights` have the names used by peft's files."""
    with appearing(folder) as partial:
        weights = {name: _owned(weight) for name, weight in named_weights}
        _save(weights, partial / "adapter_model.safetensors")
        when_there_is_room(partial, lambda: _save_settings(partial, _peft_config(model), tokenizer))


def _peft_config(model: Any) -> Any:
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    return config


def adapter_config(model: Any) -> dict[str, Any]:
    """Return the adapter_config.json of a model's adapter, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        _peft_config(model).save_pretrained(folder)
        values: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return values


def name_padding(config: Any, tokenizer: Any) -> None:
    """Give a model with a scalar head, and the tokenizer, a padding token different from the end of sequence.

    transformers scores a sequence at the last token before padding, which would otherwise be the token before the end.
    Without a suitable token the config names none: transformers then scores single sequences, and refuses batches.
    """
    if not has_score_head(config):
        return
    text = config.get_text_config()
    own_ends = text.eos_token_id
    ends = {tokenizer.eos_token_id, *(own_ends if isinstance(own_ends, list) else [own_ends])}
    special = tokenizer.convert_tokens_to_ids(sorted(t for t in tokenizer.all_special_tokens if "pad" in t.lower()))
    added = [i for i, t in sorted(tokenizer.added_tokens_decoder.items()) if "pad" in t.content.lower()]
    named = [getattr(text, "pad_token_id", None), tokenizer.pad_token_id, *special, *added]
    for token_id in (*named, tokenizer.bos_token_id, tokenizer.unk_token_id):
        is_token = token_id is not None and 0 <= token_id < text.vocab_size
        token = tokenizer.convert_ids_to_tokens(token_id) if is_token else None
        if token is not None and token_id not in ends and token not in str(tokenizer.chat_template or ""):
            text.pad_token_id = token_id
            tokenizer.pad_token = token
            return
    text.pad_token_id = None
    _log.warning("the tokenizer has no padding token, so transformers can score only one sequence at a time")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to the final folder at the end, and removed after a failure.

    Files get this process's usual mode, not the owner's alone.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial, parents=True)
    try:
        yield partial
        when_there_is_room(partial, lambda: _share(partial))
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _share(folder: Path) -> None:
    """Set the mode of all files in the folder to the default under the process's umask."""
    sample = folder / ".mode"
    sample.touch()
    mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _write_shards(folder: Path, named_weights: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> None:
    shards: list[list[str]] = []  # the names of the weights in each file
    shard: dict[str, Tensor] = {}
    total = size = 0

    def close_shard() -> None:
        _save(shard, folder / f"shard-{len(shards)}")
        shards.append(list(shard))
        shard.clear()

    for name, weight in named_weights:
        if shard and size + weight.nbytes > shard_bytes:
            close_shard()
            size = 0
        shard[name] = _owned(weight)
        size += weight.nbytes
        total += weight.nbytes
    close_shard()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    file_of: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        file_of.update(dict.fromkeys(names, file))
    table = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_atomic(folder / "model.safetensors.index.json", json.dumps(table, indent=2))


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """Write a file, with a wait for room on a full disk. The gathering ranks wait for this rank."""
    needed = sum(weight.nbytes for weight in weights.values())
    write_aside(path, lambda aside: save_file(weights, aside, metadata={"format": "pt"}), needed=needed)


def _save_model_settings(folder: Path, model: Any, config: Any, tokenizer: Any) -> None:
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)  # copies the class's file, and names it in the config
    _save_settings(folder, config, tokenizer)
    if model.can_generate():  # save_pretrained would refuse values with which the model was loaded
        model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _save_settings(folder: Path, *settings: Any) -> None:
    for part in settings:
        part.save_pretrained(folder)


def _owned(weight: Tensor) -> Tensor:
    """Return a copy on the host, since the stream may reuse the memory for the next weight."""
    return weight.detach().to("cpu", copy=True).contiguous()
