"""Write the resolved configuration as YAML with every value in effect. Loading it gives the same tree.

Keys without effect in the run are left out, since load refuses them.
"""

from __future__ import annotations

from typing import Any

from rlhf.config.files.load import LoadedConfig
from rlhf.config.pipeline import model_places
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import in_effect
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage, final_folder
from rlhf.config.validation.unused_keys import inert_keys
from rlhf.config.yaml_tree import from_yaml, remove, to_yaml
from rlhf.tracking.logs import redact_config


def dump_masked_yaml(config: Stage | LoadedConfig) -> str:
    """`dump_yaml` with secrets masked value by value, to keep the file valid YAML."""
    return to_yaml(redact_config(from_yaml(dump_yaml(config))))


def dump_yaml(config: Stage | LoadedConfig) -> str:
    """Return a run, or a pipeline of all given stages, as a file for `rlhf train`."""
    if isinstance(config, Config):
        return to_yaml(_tree(config))
    if isinstance(config, MergeStage | EvaluationStage):
        tree = _tree(config)
        pipeline, _, name = config.run.name.partition("/")
        return to_yaml({"run": {**tree.pop("run"), "name": pipeline}, "stages": {name: tree}})
    if not config.is_pipeline:
        return to_yaml(_tree(next(iter(config.stages.values()))))
    stages: dict[str, dict[str, Any]] = {}
    names_by_folder: dict[str, str] = {}
    run: dict[str, Any] = {}
    for name, stage in config.stages.items():
        tree = _tree(stage)
        run = tree.pop("run")
        for key, values in model_places(tree):
            values[key[-1]] = names_by_folder.get(values[key[-1]], values[key[-1]])
        stages[name] = tree
        names_by_folder[str(final_folder(stage))] = f"stage:{name}"
    return to_yaml({"run": {**run, "name": config.name}, "stages": stages})


def _tree(config: Stage) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    if isinstance(config, MergeStage):
        return tree | {"merge": in_effect(config.merge)}
    for inert in inert_keys(config):
        remove(tree, inert.key)
    return tree
