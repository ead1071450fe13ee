"""The resolved configuration as YAML: every value in effect, defaults written out. Loading it gives the same tree.

Keys without effect in the run are left out, since load refuses them.
"""

from __future__ import annotations

from typing import Any

from rlhf.config.effect import inert_keys
from rlhf.config.load import LoadedConfig, run_folder
from rlhf.config.pipeline import MODELS
from rlhf.config.root import Config
from rlhf.config.yaml_tree import to_yaml


def dump_yaml(config: Config | LoadedConfig) -> str:
    """One run, or a whole pipeline, as a file for `rlhf train`."""
    if isinstance(config, Config):
        return to_yaml(_tree(config))
    if not config.is_pipeline:
        return to_yaml(_tree(next(iter(config.stages.values()))))
    stages: dict[str, dict[str, Any]] = {}
    names_by_folder: dict[str, str] = {}
    run: dict[str, Any] = {}
    for name, stage in config.stages.items():
        tree = _tree(stage)
        run = tree.pop("run")
        for section, key in MODELS:
            values = tree.get(section)
            if values is not None and values.get(key) is not None:
                values[key] = names_by_folder.get(values[key], values[key])
        stages[name] = tree
        names_by_folder[str(run_folder(stage) / "final")] = f"stage:{name}"
    return to_yaml({"run": {**run, "name": config.name}, "stages": stages})


def _tree(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for inert in inert_keys(config):
        _prune(tree, inert.key)
    return tree


def _prune(tree: dict[str, Any], key: tuple[str, ...]) -> None:
    node: Any = tree
    for part in key[:-1]:
        node = node.get(part)
        if not isinstance(node, dict):
            return  # a section around it is gone, or null
    node.pop(key[-1], None)
