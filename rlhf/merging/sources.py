"""Find the models of a merge as local folders and check that all fit together.

No weight is loaded here. Names, shapes and sizes come from the headers of the safetensors files.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SEQUENCE_CLASSIFIERS,
)

from rlhf.errors import UserError, prefix_errors
from rlhf.models.adapters.settings import base_of, read_adapter_settings
from rlhf.models.files.loading import load_model_config, load_tokenizer, split_revision

HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Describe a LoRA adapter as saved by peft."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    shapes: Shapes

    @property
    def is_scored(self) -> bool:
        """Return True for an adapter of a reward model or critic, on a base with a scalar head."""
        return bool(self.settings.get("task_type") == "SEQ_CLS")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSource:
    """Describe a model of the merge: the whole weights, and any adapter."""

    key: str  # as in the configuration, for messages: merge.models.math
    name: str  # math, or base
    folder: Path  # folder of the whole weights
    config: Any  # config of transformers; its architecture is that of the model with the adapter
    shapes: Shapes  # a tied head is left out
    adapter: Adapter | None

    @property
    def own_folder(self) -> Path:
        """Return the folder named in the configuration: the adapter's for an adapter, else the model's."""
        return self.folder if self.adapter is None else self.adapter.folder

    def tokenizer(self) -> Any:
        """Load the tokenizer in the adapter's folder, or else the model's."""
        folder = self.own_folder
        with prefix_errors(self.key):
            return load_tokenizer(str(folder if (folder / "tokenizer_config.json").is_file() else self.folder))


def find_source(key: str, name: str, model: str) -> MergeSource:
    """Find the model and download it if `model` is a hub name. Raise UserError for a missing or unreadable model."""
    folder = _local(key, model)
    adapter: Adapter | None = None
    if (folder / "adapter_config.json").is_file():
        adapter = _read_adapter(key, folder)
        with prefix_errors(key):
            base, _ = base_of(folder)
        folder = _local(f"{key}: the base model of the adapter {folder} (its adapter_config.json)", base)
    with prefix_errors(key):
        config = load_model_config(str(folder))
    shapes = weight_shapes(key, folder, config)
    if adapter is not None and adapter.is_scored:
        config.architectures = [SEQUENCE_CLASSIFIERS.get(config.model_type, "ForSequenceClassification")]
        shapes.pop("lm_head.weight", None)
        shapes["score.weight"] = (1, config.get_text_config().hidden_size)
    return MergeSource(key=key, name=name, folder=folder, config=config, shapes=shapes, adapter=adapter)


def weight_shapes(key: str, folder: Path, config: Any) -> Shapes:
    """Return the shapes of all weights in a folder. A tied head is left out, because only some files contain it."""
    shapes = _read_shapes(key, folder)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def check_distinct(sources: Sequence[MergeSource]) -> None:
    """Reject a model given twice: the weights would count only once, and its task vector would be zero."""
    seen: dict[Path, MergeSource] = {}
    for source in sources:
        place = source.own_folder.resolve()
        if place in seen:
            raise UserError(
                f"{source.key}: is the same model as {seen[place].key} ({source.own_folder}); name it once."
            )
        seen[place] = source


def check_same_weights(sources: Sequence[MergeSource]) -> None:
    """Check for one architecture with equal weight names and shapes. UserError describes the first difference."""
    first = sources[0]
    for other in sources[1:]:
        _check_same_kind(first, other)
        both = _both(first, other)
        if missing := sorted(first.shapes.keys() ^ other.shapes.keys()):
            owner = first if missing[0] in first.shapes else other
            raise UserError(
                f"{both} do not have the same weights: only {owner.key} has {missing[0]} ({len(missing)} differ). A "
                "merge needs models of one architecture and size."
            )
        for weight, shape in first.shapes.items():
            if other.shapes[weight] != shape:
                raise UserError(
                    f"{both} differ in size: {weight} is {list(shape)} in the first model and "
                    f"{list(other.shapes[weight])} in the second. A merge needs models of one architecture and size."
                )


def check_stackable(sources: Sequence[MergeSource]) -> None:
    """Check for one architecture with equal widths. The number of layers may differ."""
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    for other in sources[1:]:
        _check_same_kind(sources[0], other, *widths)


def check_same_tokenizer(sources: Sequence[MergeSource], *, chosen: str | None) -> None:
    """Check for equal vocabularies and, unless `chosen` names a source, chat templates. UserError names two models."""
    tokenizers = {source.key: source.tokenizer() for source in sources}
    first, *others = sources
    for other in others:
        a, b = (tokenizers[source.key].get_vocab() for source in (first, other))
        if a != b:
            token = min(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
            raise UserError(
                f"{_both(first, other)} have different vocabularies of {len(a)} and {len(b)} tokens: {token!r} is "
                f"{a.get(token, 'no token')} in the first model and {b.get(token, 'no token')} in the second. A merge "
                "needs models with the same tokenizer."
            )
    templates = [(source.key, tokenizers[source.key].chat_template) for source in sources if source.name != "base"]
    different = [key for key, template in templates if template != templates[0][1]]
    if chosen is None and different:
        raise UserError(
            f"{templates[0][0]} and {different[0]} have different chat templates; set merge.tokenizer to the model "
            "whose template the result gets."
        )


def check_layers(source: MergeSource, first: int, end: int) -> None:
    """Check that the model has the layers from `first` up to, not including, `end`."""
    has = getattr(source.config, "num_hidden_layers", None)
    if has is None:
        raise UserError(
            f"{source.key}: {source.folder} is a {source.config.model_type} without num_hidden_layers; its "
            "layers cannot be stacked."
        )
    if end > has:
        raise UserError(f"merge.slices: layers [{first}, {end}] of {source.name}, but it has {has} layers.")


def check_space(out: Path, needed: int, *, key: str) -> None:
    """Check for enough free disk space where `out` will be. Errors name the configuration key `key`."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{key}: the merge writes {needed / 1e9:.1f} GB to {parent}, which has {free / 1e9:.1f} GB "
            "free. Free some, or name another folder."
        )


def num_bytes(shapes: Shapes, dtype: str) -> int:
    return DTYPE_BYTES[dtype] * sum(math.prod(shape) for shape in shapes.values())


def _both(first: MergeSource, other: MergeSource) -> str:
    return f"{first.key} ({first.own_folder}) and {other.key} ({other.own_folder})"


def _check_same_kind(first: MergeSource, other: MergeSource, *keys: str) -> None:
    for key in ("architectures", "tie_word_embeddings", *keys):
        a, b = (getattr(source.config, key, None) for source in (first, other))
        if a != b:
            a, b = (", ".join(value) if isinstance(value, list) else value for value in (a, b))
            name = "architecture" if key == "architectures" else key
            raise UserError(
                f"{_both(first, other)} do not fit: {name} is {a} in the first model and {b} in the second."
            )


def _local(key: str, model: str) -> Path:
    """Return the folder of a model, downloaded if `model` is a hub name or NAME@REVISION."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith("stage:"):
        raise UserError(f"{key}: got {model!r}, but this merge is not a stage of a pipeline; name a folder.")
    name, revision = split_revision(model)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}: the folder {model} does not exist.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {model} is not a folder here, and the hub did not provide it ({' '.join(str(error).split())})"
        ) from error


def _read_adapter(key: str, folder: Path) -> Adapter:
    with prefix_errors(key):
        settings = read_adapter_settings(folder)
    if settings["peft_type"] != "LORA":
        raise UserError(f"{key}: {folder} is a {settings['peft_type']} adapter; only LoRA adapters can be merged.")
    return Adapter(folder=folder, settings=settings, shapes=_read_shapes(key, folder))


def _read_shapes(key: str, folder: Path) -> Shapes:
    shapes: Shapes = {}
    for file in _weight_files(key, folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{key}: {file} cannot be read ({error}); copy or download it again.") from error
    return shapes


def _weight_files(key: str, folder: Path) -> list[Path]:
    """Return the files listed in the index, or the single file read by transformers or peft."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        if missing := sorted(file.name for file in files if not file.is_file()):
            raise UserError(f"{key}: {folder} lacks {missing[0]}, which its index names; copy or download it again.")
        return sorted(files)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{key}: {folder} has no safetensors file; no other format is read.")
