"""Run a merge section: check all inputs, then write the folder. `rlhf merge` and pipeline stages use this module."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.problem import refuse
from rlhf.config.schema.merge import MergeConfig, in_effect
from rlhf.config.validation.merge import merge_problems
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import RunError, UserError
from rlhf.merging.sources import (
    MergeSource,
    check_distinct,
    check_layers,
    check_same_tokenizer,
    check_same_weights,
    check_space,
    check_stackable,
    find_source,
    num_bytes,
    weight_shapes,
)
from rlhf.merging.whole import run_mergekit, shard_bytes
from rlhf.models.files.export import appearing, name_padding
from rlhf.models.files.loading import load_model_config

RECORD = "merge.yaml"


def merge_models(config: MergeConfig, out: Path, *, quiet: bool = False) -> None:
    """Make the folder `out` with weights, config, tokenizer, chat template, and the record merge.yaml.

    All inputs are checked before a weight is loaded, and the folder appears whole or not at all. UserError: a model is
    missing or unreadable, or two models do not fit; `out` exists or is below a file; the disk is too small. RunError:
    mergekit failed.
    """
    refuse(merge_problems(config), lambda key: "config")
    if out.exists():
        raise UserError(f"merge.out: {out} exists; remove the folder or name another folder.")
    if not (above := next(folder for folder in out.absolute().parents if folder.exists())).is_dir():
        raise UserError(f"merge.out: {out} cannot be made, since {above} is a file; name another folder.")
    require_tools(config)
    sources = checked_sources(config, out, key="merge.out")
    with appearing(out) as partial:
        write_merge(config, sources, partial, out=out, quiet=quiet)


def require_tools(config: MergeConfig) -> None:
    """Raise UserError if the method needs mergekit and mergekit is not installed."""
    if _uses_mergekit(config) and importlib.util.find_spec("mergekit") is None:
        raise UserError(
            f"merge.method: {config.method} needs mergekit, which is not installed: pip install 'ray-rlhf[merging]'"
        )


def _uses_mergekit(config: MergeConfig) -> bool:
    return config.output == "model" and config.method != "fold"


def checked_sources(config: MergeConfig, out: Path, *, key: str) -> list[MergeSource]:
    """Return the models in the order of the section, and the base, after checking that all fit together.

    UserError: a model is missing or does not fit, or the disk of `out` is too small; the error then names `key`.
    """
    sources = [find_source(f"merge.models.{name}", name, model.model) for name, model in config.models.items()]
    if config.base is not None:
        sources.append(find_source("merge.base", "base", config.base))
    if len(sources) > 1:
        check_distinct(sources)
    check_fit(config, sources)
    check_space(out, _needed_bytes(config, sources), key=key)
    return sources


def write_merge(config: MergeConfig, sources: Sequence[MergeSource], folder: Path, *, out: Path, quiet: bool) -> None:
    """Write the whole result into the empty folder `folder`, to be renamed to `out` later."""
    if config.output == "adapter":
        from rlhf.merging.adapters import combine_adapters  # with peft, which takes seconds

        combine_adapters(config, sources, folder)
    elif config.method == "fold":
        from rlhf.merging.adapters import fold_adapter

        fold_adapter(sources[0], folder, dtype=getattr(torch, config.dtype), shard_bytes=shard_bytes(config))
    else:
        with tempfile.TemporaryDirectory(prefix=".folded-", dir=folder) as scratch:
            _merge_whole(config, sources, folder, Path(scratch), quiet)
    _add_tokenizer(config, sources, folder)
    (folder / RECORD).write_text(_record(config, out), encoding="utf-8")


def check_fit(config: MergeConfig, sources: Sequence[MergeSource]) -> None:
    """Check for an equal architecture and vocabulary, or a common base of adapters. UserError names two models."""
    if config.output == "adapter":
        from rlhf.merging.adapters import check_combinable  # with peft, which takes seconds

        check_combinable(sources, method=config.method, rank=config.rank)
    elif config.method == "passthrough":
        check_stackable(sources)
        by_name = {source.name: source for source in sources}
        for part in config.slices:
            check_layers(by_name[part.model], *part.layers)
    elif config.method == "fold" and sources[0].adapter is None:
        raise UserError(f"{sources[0].key}: {sources[0].folder} is not an adapter, which fold adds to its base.")
    else:
        check_same_weights(sources)
    if len(sources) > 1:
        check_same_tokenizer(sources, chosen=config.tokenizer)


def _needed_bytes(config: MergeConfig, sources: Sequence[MergeSource]) -> int:
    """Return an upper bound on the disk space for the result and for folded adapters."""
    if config.output == "adapter":
        return sum(num_bytes(source.adapter.shapes, "float32") for source in sources if source.adapter is not None)
    result = num_bytes(sources[0].shapes, config.dtype)
    if config.method == "passthrough":
        layers = sum(end - first for first, end in (part.layers for part in config.slices))
        result = result * max(1, -(-layers // sources[0].config.num_hidden_layers))
    folded = [source for source in sources if source.adapter is not None and config.method != "fold"]
    return result + sum(num_bytes(source.shapes, "float32") for source in folded)


def _merge_whole(config: MergeConfig, sources: Sequence[MergeSource], folder: Path, scratch: Path, quiet: bool) -> None:
    folders = {source.name: source.folder for source in sources}
    for source in sources:
        if source.adapter is not None:
            from rlhf.merging.adapters import fold_adapter  # with peft, which takes seconds

            folders[source.name] = scratch / source.name
            fold_adapter(source, folders[source.name], dtype=torch.float32, shard_bytes=shard_bytes(config))
    run_mergekit(config, folders, folder, quiet=quiet)
    donor = _donor(config, sources)
    result = load_model_config(str(folders[donor.name]))
    if config.method == "passthrough":
        _set_layers(config, sources, result)
    result.dtype = getattr(torch, config.dtype)
    name_padding(result, donor.tokenizer())
    result.save_pretrained(folder)
    if config.method != "passthrough":
        _check_complete(folders[donor.name], folder, result)


def _set_layers(config: MergeConfig, sources: Sequence[MergeSource], result: Any) -> None:
    """Set the number of layers, and the type of each layer if the architecture has several types."""
    by_name = {source.name: source.config for source in sources}
    layers = [(by_name[part.model], layer) for part in config.slices for layer in range(*part.layers)]
    result.num_hidden_layers = len(layers)
    if kinds := [model.layer_types[layer] for model, layer in layers if getattr(model, "layer_types", None)]:
        result.layer_types = kinds


def _check_complete(donor: Path, folder: Path, config: Any) -> None:
    """Raise RunError if mergekit left out weights because of an unknown part of the architecture."""
    expected, merged = (weight_shapes("merge.out", place, config) for place in (donor, folder))
    if lost := sorted(expected.keys() - merged.keys()):
        raise RunError(
            f"mergekit left out {len(lost)} weights of the {', '.join(config.architectures)}, the first {lost[0]}: it "
            "does not know this architecture well enough."
        )


def _add_tokenizer(config: MergeConfig, sources: Sequence[MergeSource], folder: Path) -> None:
    donor = _donor(config, sources)
    tokenizer = donor.tokenizer()
    if config.output == "model":
        name_padding(load_model_config(str(folder)), tokenizer)
    tokenizer.save_pretrained(folder)
    if config.output == "model":
        for file in (donor.folder / "generation_config.json", *donor.folder.glob("*processor_config.json")):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _donor(config: MergeConfig, sources: Sequence[MergeSource]) -> MergeSource:
    return next((source for source in sources if source.name == config.tokenizer), sources[0])


def _record(config: MergeConfig, out: Path) -> str:
    """Return the section in effect as YAML. `rlhf merge merge.yaml merge.out=ELSEWHERE` repeats the merge."""
    names = ["ray-rlhf", "torch", "transformers", "peft", *(["mergekit"] if _uses_mergekit(config) else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"# made by {versions}\n" + to_yaml({"merge": {**in_effect(config), "out": str(out)}})
