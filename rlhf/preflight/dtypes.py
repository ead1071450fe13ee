"""Name the data types chosen by the device. A run that continues on another kind of CPU keeps its data types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rlhf.config.derive import model_sections, with_model_sections
from rlhf.config.files.load import LoadedConfig, load
from rlhf.config.schema.model import ModelConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import run_folder
from rlhf.config.yaml_tree import Key
from rlhf.errors import UserError
from rlhf.objectives.costs import why_dtype


def with_recorded_dtypes(loaded: LoadedConfig) -> LoadedConfig:
    """Give each model without a written dtype the dtype recorded in the run's folder, if the folder has a run."""
    stages = dict(loaded.stages)
    for name, config in loaded.runs.items():
        try:
            (before,) = load(run_folder(config) / "config.resolved.yaml").runs.values()
        except UserError:  # nothing to continue, or a folder that the checks of a resumption refuse
            continue
        there = model_sections(before)
        changed = {
            key: section.model_copy(update={"dtype": there[key].dtype})
            for key, section in _chosen(loaded, name, config)
            if key in there
        }
        stages[name] = with_model_sections(config, changed)
    return replace(loaded, stages=stages)


def chosen_dtype(loaded: LoadedConfig) -> str | None:
    """Return a sentence on the data types that the device chose, or None if the file has all data types."""
    for name, config in loaded.runs.items():
        if chosen := tuple(_chosen(loaded, name, config)):
            keys = ", ".join(f"{'.'.join(key)}.dtype={section.dtype}" for key, section in chosen)
            return f"{keys}, {why_dtype(config.cluster.device)}"
    return None


def _chosen(loaded: LoadedConfig, name: str, config: Config) -> Iterator[tuple[Key, ModelConfig]]:
    """Yield the sections of models whose dtype the device chose. A configuration without places names all dtypes."""
    for key, section in model_sections(config).items() if loaded.places else ():
        written = {(*key, "dtype"), ("stages", name, *key, "dtype")} & loaded.places.keys()
        if not written:
            yield key, section
