"""Fold an adapter into the base model, or combine several adapters into one, with peft.

Both operations hold the base model in memory in float32, because peft computes in the dtype of the base weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from rlhf.config.schema.merge import MergeConfig
from rlhf.errors import UserError, prefix_errors
from rlhf.merging.sources import MergeSource
from rlhf.models.adapters.config import adapted_modules, load_adapter_config
from rlhf.models.adapters.lora import with_merged_adapter
from rlhf.models.files.export import name_padding
from rlhf.models.files.loading import class_of

COMBINED = "combined"
_ADDS_FACTORS = frozenset({"linear", "ties", "dare_linear", "dare_ties"})


def fold_adapter(source: MergeSource, folder: Path, *, dtype: torch.dtype, shard_bytes: int) -> None:
    """Add the adapter's update to every adapted layer in float32, and save whole weights in `dtype`."""
    assert source.adapter is not None
    model = with_merged_adapter(_load_base(source), str(source.adapter.folder))
    model.config.architectures = [type(model).__name__]
    name_padding(model.config, source.tokenizer())
    for parameter in model.parameters():  # buffers keep their dtype: some are float32 in a model of any dtype
        parameter.data = parameter.data.to(dtype)
    model.generation_config = transformers.GenerationConfig()  # an inconsistent generation config cannot be saved
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the result gets the file of the donor model


def combine_adapters(config: MergeConfig, sources: Sequence[MergeSource], folder: Path) -> None:
    """Combine adapters of a common base with peft's add_weighted_adapter, and save the result."""
    model: Any = None
    for index, source in enumerate(sources):
        assert source.adapter is not None
        path, name = str(source.adapter.folder), f"adapter_{index}"  # peft forbids some names of users
        with prefix_errors(source.key):
            settings = _settings_to_combine(source.adapter.folder)
        base = _load_base(source) if model is None else None
        with _peft_errors(f"{source.key}: the adapter {path} cannot be put on its base model {source.folder}"):
            if model is None:
                model = peft.PeftModel.from_pretrained(base, path, adapter_name=name, config=settings)
            else:
                model.add_adapter(name, settings)
                model.load_adapter(path, adapter_name=name)
    inputs, method = [config.models[source.name] for source in sources], config.method
    adapters = [f"adapter_{index}" for index in range(len(sources))]
    weights = [model_input.weight for model_input in inputs]
    if method == "svd" and len(sources) == 1:  # two equal halves: peft would only scale a single adapter
        adapters, weights = adapters * 2, [weights[0] / 2.0] * 2
    keys = ", ".join(source.key for source in sources)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _peft_errors(f"{keys} cannot be combined"):
        if "dare" in method:
            torch.manual_seed(config.seed)
        model.add_weighted_adapter(
            adapters,
            weights,
            COMBINED,
            combination_type=method,
            svd_rank=config.rank,
            svd_full_matrices=False,
            density=inputs[0].density if "ties" in method or "dare" in method else None,
        )
    for name, parameter in model.named_parameters():
        if f".{COMBINED}." in name:
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    model.peft_config[COMBINED].inference_mode = True
    model.save_pretrained(str(folder), selected_adapters=[COMBINED])
    for file in (folder / COMBINED).iterdir():  # peft saves an adapter in a subfolder with its name
        file.rename(folder / file.name)
    (folder / COMBINED).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card


def check_combinable(sources: Sequence[MergeSource], *, method: str, rank: int | None) -> None:
    """Check for plain adapters of one base, of equal ranks if the method adds factors. UserError names two sources."""
    for source in sources:
        _check_plain(source, rank)
    first, *others = sources
    for other in others:
        if first.folder.resolve() != other.folder.resolve():
            raise UserError(
                f"{first.key} and {other.key} are adapters of different bases, {first.folder} and {other.folder}; set "
                "merge.output to model, or combine adapters of one base."
            )
        ranks = [_ranks(source) for source in (first, other)]
        if method in _ADDS_FACTORS and ranks[0] != ranks[1]:
            able = "cat or svd" if method == "linear" else f"cat, svd or {method}_svd"
            raise UserError(
                f"{first.key} and {other.key} are adapters of ranks {ranks[0]} and {ranks[1]}, and {method} needs "
                f"equal ones; use {able}."
            )


def _check_plain(source: MergeSource, rank: int | None) -> None:
    if source.adapter is None:
        raise UserError(
            f"{source.key}: {source.folder} is a whole model, and merge.output is adapter; name an adapter, or set "
            "merge.output to model."
        )
    for key in ("use_dora", "use_rslora", "modules_to_save", "target_parameters"):
        if source.adapter.settings.get(key):
            raise UserError(
                f"{source.key}: the adapter {source.adapter.folder} has {key}, and such adapters cannot be combined; "
                "set merge.output to model."
            )
    narrowest = min(max(shape) for shape in source.adapter.shapes.values())
    if rank is not None and rank > narrowest:
        raise UserError(f"merge.rank: {rank} is more than {narrowest}, the narrowest layer of {source.key}.")


def _ranks(source: MergeSource) -> str:
    assert source.adapter is not None
    settings = source.adapter.settings
    pattern = settings.get("rank_pattern") or {}
    return f"{settings['r']}" + (f" {pattern}" if pattern else "")


def _settings_to_combine(folder: Path) -> Any:
    """Return peft's config with full names of the layers: a combination gets the first adapter's choice of layers."""
    settings: Any = load_adapter_config(folder)
    settings.target_modules = adapted_modules(folder)
    settings.layers_to_transform = settings.layers_pattern = None
    return settings


@contextmanager
def _peft_errors(message: str) -> Iterator[None]:
    """Raise peft's errors as UserError, with the message before their text."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{message}: {' '.join(str(error).split())}") from error


def _load_base(source: MergeSource) -> Any:
    """Load the base model of an adapter. An adapter for sequence classification gets a base with a scalar head."""
    assert source.adapter is not None
    options = {"num_labels": 1} if source.adapter.is_scored else {}
    kind = class_of(source.config, scalar=source.adapter.is_scored)
    return kind.from_pretrained(str(source.folder), dtype=torch.float32, use_safetensors=True, **options)
