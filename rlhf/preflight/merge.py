"""Check a merge stage of a pipeline, as far as possible before the models exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf.config.derive import saved_rank
from rlhf.config.schema.merge import MergeConfig
from rlhf.config.schema.model import LoraConfig
from rlhf.config.schema.stages import MergeStage
from rlhf.data.templates import UNCHANGED
from rlhf.errors import UserError
from rlhf.merging.merge import check_fit, checked_sources, require_tools
from rlhf.merging.sources import MergeSource, find_source
from rlhf.models.files.hub import use_cache_if_silent
from rlhf.models.on_disk import may_ask_the_hub
from rlhf.preflight.models import StageResults
from rlhf.preflight.sources import local_model


def with_local_models(stage: MergeStage, pipeline: Path) -> MergeConfig:  # tiny:llama becomes a folder
    config, seed = stage.merge, stage.run.seed
    models = {
        name: source.model_copy(update={"model": local_model(source.model, pipeline, seed=seed)})
        for name, source in config.models.items()
    }
    base = None if config.base is None else local_model(config.base, pipeline, seed=seed)
    return config.model_copy(update={"models": models, "base": base})


def foresee(config: MergeConfig, made: StageResults, *, final: str) -> None:
    """Raise UserError if the merge is already known to fail. Records the expected result as `final` in `made`."""
    require_tools(config)
    models = {name: source.model for name, source in config.models.items()}
    if config.base is not None:
        models["base"] = config.base
    if any(may_ask_the_hub(model) for model in models.values() if model not in made.finals):
        use_cache_if_silent()
    awaited = {name: model for name, model in models.items() if model in made.finals}
    for name, model in awaited.items():
        _refuse_other_kind(config, _key(name), model, made.adapters.get(model))
    _refuse_twice(models)
    _refuse_mixed_heads(awaited, made)
    # A missing model differs from the stage's initial model only in the values.
    sources = {name: find_source(_key(name), name, made.finals.get(model, model)) for name, model in models.items()}
    if not awaited:
        checked_sources(config, Path(final), key="run.dir")
    elif config.output == "adapter":
        _refuse_other_bases(sources)
    elif config.method != "fold" and made.restacked.union(made.scored).isdisjoint(models.values()):
        check_fit(config, list(sources.values()))
    _note(config, models, sources, made, final)


def _key(name: str) -> str:
    return "merge.base" if name == "base" else f"merge.models.{name}"


def _refuse_other_kind(config: MergeConfig, key: str, folder: str, lora: LoraConfig | None) -> None:
    """Raise UserError if a stage's result is not the adapter, or not the whole model, that the method needs."""
    if lora is None and config.output == "adapter":
        raise UserError(f"{key}: {folder} will be a whole model, and merge.output is adapter; set it to model.")
    if lora is None and config.method == "fold":
        raise UserError(f"{key}: {folder} will be a whole model, and fold adds an adapter to its base.")
    for kind in ("dora", "rslora", "modules_to_save", "target_parameters") if config.output == "adapter" else ():
        if getattr(lora, kind):
            text = f"will be an adapter with {kind}, and such adapters cannot be combined; set merge.output to model."
            raise UserError(f"{key}: {folder} {text}")


def _refuse_twice(models: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for name, model in models.items():
        if model in first:
            raise UserError(f"{_key(name)}: is the same model as {_key(first[model])} ({model}); name it once.")
        first[model] = name


def _refuse_mixed_heads(awaited: Mapping[str, str], made: StageResults) -> None:
    scored = [name for name, model in awaited.items() if model in made.scored]
    others = [name for name, model in awaited.items() if model not in made.scored]
    if scored and others:
        raise UserError(
            f"{_key(scored[0])} ({awaited[scored[0]]}) will have a scalar head and {_key(others[0])} "
            f"({awaited[others[0]]}) will be a language model: a merge needs models of one architecture."
        )


def _refuse_other_bases(sources: Mapping[str, MergeSource]) -> None:
    (first, source), *others = sources.items()
    for name, other in others:
        if source.folder.resolve() != other.folder.resolve():
            raise UserError(
                f"{_key(first)} and {_key(name)} are adapters of different bases, {source.folder} and {other.folder}; "
                "set merge.output to model, or combine adapters of one base."
            )


def _note(
    config: MergeConfig, models: Mapping[str, str], sources: Mapping[str, MergeSource], made: StageResults, final: str
) -> None:
    """Record the properties of the result for later stages."""
    donor = config.tokenizer or next(iter(config.models))
    made.finals[final] = str(sources[donor].folder)
    made.templates[final] = made.templates.get(models[donor], UNCHANGED)
    if models[donor] in made.scored or _is_scored(sources[donor]):
        made.scored[final] = made.scored.get(models[donor], "reward_model")
    if config.method == "passthrough" or models[donor] in made.restacked:
        made.restacked.add(final)
    if config.output == "adapter":
        ranks = [_rank(model, sources[name], made) for name, model in models.items()]
        rank = sum(ranks) if config.method == "cat" else config.rank or max(ranks)
        made.adapters[final] = LoraConfig(rank=rank, alpha=float(rank))


def _is_scored(source: MergeSource) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in source.config.architectures or [])


def _rank(model: str, source: MergeSource, made: StageResults) -> int:
    if model in made.adapters:
        return saved_rank(made.adapters[model])
    return 0 if source.adapter is None else int(source.adapter.settings["r"])
