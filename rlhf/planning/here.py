"""Find the needs of a run that this machine does not meet, because `rlhf plan` also plans for larger machines."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.config.derive import eval_sets, hub_name, train_sets
from rlhf.config.files.load import LoadedConfig
from rlhf.config.pipeline import model_places
from rlhf.config.placement_plan import assign_nodes, plan_placement
from rlhf.config.schema.data import DataSource, PresetConfig
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.rewards import functions_of_rubric
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage, final_folder
from rlhf.data.files import FILE_SUFFIXES
from rlhf.extensions import find_code
from rlhf.planning.shapes import hub_folder
from rlhf.rewards.functions.table import BUILT_INS as REWARDS
from rlhf.rollouts.environments.built_in import BUILT_INS as ENVIRONMENTS
from rlhf.tracking.run_folder.environment import num_cpus

_UNCACHED = "and the cache of the model hub does not hold it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    sentence: str
    hub_name: str | None = None  # the model or data set, if possibly on the hub; None: no download helps


def missing_here(loaded: LoadedConfig) -> list[Missing]:
    """Return everything missing on this machine. If the list is empty, all inputs can be checked here.

    Raise UserError for a reward or an environment with an unknown name.
    """
    folder = Path(loaded.source).resolve().parent
    missing: dict[Missing, None] = {}
    made: set[str] = set()  # folders written by earlier stages
    for name, stage in loaded.stages.items():
        prefix = f"stages.{name}." if loaded.is_pipeline else ""
        needs = [*_resources(stage), *_models(stage, made), *_data(stage), *_code(stage, folder)]
        missing |= {replace(need, sentence=f"{prefix}{need.sentence}"): None for need in needs}
        if not isinstance(stage, EvaluationStage):
            made.add(str(final_folder(stage)))
    return list(missing)


def num_gpus() -> int:
    """Return the number of NVIDIA GPUs visible to a process on this machine, without starting CUDA."""
    count, visible = len(list(Path("/dev").glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, sum(word not in ("", "-1") for word in visible.split(",")))


def _resources(stage: Stage) -> Iterator[Missing]:
    """Yield the resources if a local Ray on this machine cannot hold the stage."""
    if isinstance(stage, MergeStage) or stage.cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    placement, cpus, gpus = plan_placement(stage), num_cpus(), num_gpus()
    if assign_nodes(placement.bundles, [{"CPU": cpus, "GPU": gpus}]) is None:
        wanted = f"{placement.total('CPU'):g} CPUs and {placement.total('GPU'):g} GPUs"
        device = " (cluster.device is cuda)" if stage.cluster.device == "cuda" else ""
        has = f"this machine has {cpus} CPUs and {gpus} GPUs"
        yield Missing(sentence=f"cluster: wants {wanted}{device}, and {has}")


def _models(stage: Stage, made: set[str]) -> Iterator[Missing]:
    for key, section in model_places(stage.model_dump(mode="json")):
        name = section[key[-1]]
        if name in made or name.startswith("tiny:") or os.path.exists(name):
            continue
        if _is_path(name):
            yield Missing(sentence=f"{'.'.join(key)}: there is no folder {name}")
        elif not os.path.exists(hub_folder("models", name)):
            yield Missing(sentence=f"{'.'.join(key)}: there is no folder {name}, {_UNCACHED}", hub_name=name)


def _data(stage: Stage) -> Iterator[Missing]:
    sources: Mapping[str, DataSource] = {}
    if isinstance(stage, Config):
        sets = {name: weighted.source for name, weighted in train_sets(stage).items()}
        sources = sets | {f"data.eval.{name}": source for name, source in eval_sets(stage).items()}
    elif isinstance(stage, EvaluationStage):
        data = stage.evaluate.data
        sources = data if isinstance(data, dict) else {} if data is None else {"evaluate.data": data}
    yield from absent_data(sources)


def absent_data(sources: Mapping[str, DataSource]) -> Iterator[Missing]:
    for key, source in sources.items():
        path = source.path if isinstance(source, PresetConfig) else None
        if path is not None and not os.path.exists(path) and not glob.glob(path, recursive=True):
            yield Missing(sentence=f"{key}: there is no file or folder {path}")
        name = hub_name(source)
        if name is None or (isinstance(source, str) and os.path.exists(source)):
            continue
        if name.endswith(FILE_SUFFIXES):
            if glob.glob(name, recursive=True):
                continue
            yield Missing(sentence=f"{key}: there is no file {source}")
        elif not os.path.exists(name) and (_is_path(name) or not os.path.exists(hub_folder("datasets", name))):
            on_hub = None if _is_path(name) else name
            yield Missing(sentence=f"{key}: there is no folder {name}, {_UNCACHED}", hub_name=on_hub)


def _code(stage: Stage, folder: Path) -> Iterator[Missing]:
    """Yield each missing code file, next to the configuration or in the current folder."""
    if isinstance(stage, MergeStage):
        return
    sampling: EvaluateConfig | RolloutsConfig | None
    if isinstance(stage, EvaluationStage):
        prefix, rewards, sampling = "evaluate.", stage.evaluate.rewards, stage.evaluate
    else:
        prefix, rewards, sampling = "", stage.rewards, stage.rollouts
    environment, agent = (None, None) if sampling is None else (sampling.environment, sampling.agent)
    named = {f"{prefix}rewards.{name}.function": reward.function for name, reward in rewards.items()}
    for judge, reward in rewards.items():
        for criterion, item in functions_of_rubric(reward).items():
            named[f"{prefix}rewards.{judge}.judge.rubric.{criterion}.function"] = item.function
    if environment is not None:
        named[f"{prefix or 'rollouts.'}environment.name"] = environment.name
    if agent is not None:
        named[f"{prefix or 'rollouts.'}agent.function"] = agent.function
    for key, name in named.items():
        file, colon, _ = (name or "").rpartition(":")
        if colon and not any(os.path.isfile(base / os.path.expanduser(file)) for base in (folder, Path.cwd())):
            yield Missing(sentence=f"{key}: there is no file {file}")
        elif name and not colon:
            if key.endswith(".function"):
                find_code("reward", name, built_ins=REWARDS, key=key)
            else:
                find_code("environment", name, built_ins=ENVIRONMENTS, key=key)


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~"))
