"""Merge whole models with mergekit: translate the section, then call mergekit's Python API.

mergekit reads one weight of every model at a time from mapped files and writes each full output file at once. Memory
therefore holds one weight of each model and one file of the result.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema.merge import MODEL_METHODS, RANDOM, MergeConfig
from rlhf.errors import RunError


def mergekit_config(config: MergeConfig, folders: dict[str, Path]) -> dict[str, Any]:
    """Translate the section to mergekit's configuration. `folders`: the whole weights of each model and of `base`."""
    tree: dict[str, Any] = {"merge_method": config.method, "dtype": "float32", "out_dtype": config.dtype}
    models = {name: {"model": {"path": str(folder)}} for name, folder in folders.items()}
    if config.method == "passthrough":
        parts = [{"model": models[part.model], "layer_range": list(part.layers)} for part in config.slices]
        return tree | {"slices": [{"sources": [part]} for part in parts]}
    if config.base is not None:
        tree["base_model"] = models["base"]
    tree["parameters"] = {} if config.normalize is None else {"normalize": config.normalize}
    if config.method == "slerp":
        tree["parameters"] = {"t": config.t}
    elif config.method != "linear":
        tree["parameters"]["lambda"] = config.scale
    keys = MODEL_METHODS[config.method].per_model
    parameters = {name: {key: getattr(model, key) for key in keys} for name, model in config.models.items()}
    return tree | {"models": [{"model": models[name], "parameters": of} for name, of in parameters.items()]}


def shard_bytes(config: MergeConfig) -> int:
    return int(config.shard_gib * 2**30)


def run_mergekit(config: MergeConfig, folders: dict[str, Path], out: Path, *, quiet: bool) -> None:
    """Write the merged weights and config.json into the folder `out`. Raise RunError if mergekit fails."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        out_shard_size=shard_bytes(config),
        copy_tokenizer=False,
        write_model_card=False,
        clone_tensors=config.method == "passthrough",  # a layer may appear twice
        quiet=quiet,
    )
    logs = [logging.getLogger(name) for name in ("mergekit", "transformers")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)  # their warnings are about option names, which are checked here
    try:
        with torch.random.fork_rng(devices=[]):
            if config.method in RANDOM:
                torch.manual_seed(config.seed)
            run_merge(MergeConfiguration.model_validate(mergekit_config(config, folders)), str(out), options)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # the errors that mergekit raises
        raise RunError(f"mergekit could not merge: {' '.join(str(error).split())}") from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        cache = LoaderCache()  # cached by path for the whole process: a later merge would reuse these files
        cache.flush_all()
        cache.loaders.clear()
