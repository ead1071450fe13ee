"""Define, check and load the section of `rlhf merge`: models, a method, and the folder for the result.

MergeConfig has no `out` and can be a stage of a pipeline. rlhf.merging merges the models. Only the YAML file is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.config.files.base_file import read_tree
from rlhf.config.files.recipes import config_file
from rlhf.config.files.yaml_tree import Key, apply_overrides, kind
from rlhf.config.mistakes.explain import Problem, parse_as, refuse
from rlhf.config.mistakes.suggestions import nearest
from rlhf.config.schema.model import Dtype
from rlhf.errors import UserError
from rlhf.sections import Section

AT: Key = ("merge",)
OF_A_RUN = frozenset({"run", "policy", "algorithm", "train", "stages"})  # sections that a merge never has

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Method = Literal[
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "passthrough",
    "fold",
    "cat",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
]


class MergeInput(Section):
    """A merged model."""

    model: str = Field(min_length=1)
    """A Hugging Face name, a local folder, or in a pipeline `stage:NAME`. An adapter folder means its base with the
    adapter added, or only the adapter if `output` is `adapter`."""
    weight: float = 1.0
    """Weight of the model, possibly negative."""
    density: float = Field(default=1.0, gt=0.0, le=1.0)
    """Fraction of task vector entries to keep. 1: all entries."""
    epsilon: float = Field(default=0.15, gt=0.0, lt=0.5)
    """DELLA: entries are kept with probabilities from density - epsilon (the smallest) to density + epsilon (the
    largest)."""


class MergeSlice(Section):
    """Layers of one model, for `passthrough`."""

    model: ModelName
    """A name in `models`."""
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    """First layer, and the layer after the last."""


class MergeConfig(Section):
    """Models to merge and how to merge them."""

    method: Method
    """Merge method. docs/merging.md has the equation of each."""
    output: Literal["model", "adapter"] = "model"
    """`model`: whole weights. `adapter`: adapters of a common base become an adapter."""
    base: str | None = Field(default=None, min_length=1)
    """Base model of the task vectors, or for slerp the model at t = 0. The base is named like the merged models. null:
    the method has no base."""
    models: dict[ModelName, MergeInput]
    """The models by names of your choice."""
    t: float = Field(default=0.5, ge=0.0, le=1.0)
    """slerp: position between `base` (0) and the model (1)."""
    scale: float = 1.0
    """Factor of the merged task vector (the papers' lambda)."""
    normalize: bool | None = None
    """Divide by the sum of the weights. ties, dare_ties and della sum only the weights of models with a kept entry.
    null: true for linear, ties and della, false otherwise."""
    slices: tuple[MergeSlice, ...] = ()
    """passthrough: the result's layers, from bottom to top."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the adapter made by an svd method. null: the largest rank of the adapters."""
    seed: int = Field(default=0, ge=0)
    """Seed for dropping entries in DARE and DELLA."""
    dtype: Dtype = "bfloat16"
    """Data type of the result. The arithmetic is float32."""
    tokenizer: ModelName | None = None
    """Source of the result's config, tokenizer, chat template and generation config: a name in `models`, or `base`.
    null: the first model."""
    shard_gib: float = Field(default=5.0, ge=1e-6)
    """Largest size of a weight file, in GiB."""


class MergeRun(MergeConfig):
    """Models to merge, the method, and the folder for the result."""

    out: Path
    """Folder to create. The folder must not exist."""


class MergeFile(Section):
    """A file for `rlhf merge`."""

    merge: MergeRun
    """The merge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """List the keys and the number of models accepted by a method, besides models, output, dtype and tokenizer."""

    keys: frozenset[str] = frozenset()  # keys of the section
    per_model: frozenset[str] = frozenset()
    least: int = 1  # number of models
    most: float = math.inf


def _takes(keys: str = "", per_model: str = "", *, least: int = 1, most: float = math.inf) -> Takes:
    return Takes(keys=frozenset(keys.split()), per_model=frozenset(per_model.split()), least=least, most=most)


RANDOM = frozenset({"dare_linear", "dare_ties", "della", "della_linear", "dare_linear_svd", "dare_ties_svd"})
MODEL_METHODS = {
    "linear": _takes("normalize", "weight", least=2),
    "slerp": _takes("base t", most=1),
    "task_arithmetic": _takes("base normalize scale", "weight"),
    "ties": _takes("base normalize scale", "weight density"),
    "dare_linear": _takes("base normalize scale seed", "weight density"),
    "dare_ties": _takes("base normalize scale seed", "weight density"),
    "della": _takes("base normalize scale seed", "weight density epsilon"),
    "della_linear": _takes("base normalize scale seed", "weight density epsilon"),
    "passthrough": _takes("slices"),
    "fold": _takes(most=1),
}
ADAPTER_METHODS = {
    "linear": _takes("", "weight"),
    "cat": _takes("", "weight"),
    "svd": _takes("rank", "weight"),
    "ties": _takes("", "weight density", least=2),  # peft only scales a single adapter, with any method
    "ties_svd": _takes("rank", "weight density", least=2),
    "dare_linear": _takes("seed", "weight density", least=2),
    "dare_linear_svd": _takes("rank seed", "weight density", least=2),
    "dare_ties": _takes("seed", "weight density", least=2),
    "dare_ties_svd": _takes("rank seed", "weight density", least=2),
}
METHODS = {"model": MODEL_METHODS, "adapter": ADAPTER_METHODS}


def load_merge_file(path: str | Path, overrides: Sequence[str] = ()) -> MergeRun:
    """Load and check a YAML file with `merge.key=value` overrides. UserError has a line for each mistake."""
    tree = read_tree(config_file(path), needs="a merge needs the section merge, with method, models and out")
    if "merge" not in tree.values and not tree.values.keys().isdisjoint(OF_A_RUN):
        raise UserError(f"{tree.source}: is the configuration of a run, not of a merge; use `rlhf train {tree.source}`")
    tree = apply_overrides(tree, overrides)
    parsed = parse_as(MergeFile, tree.values)
    refuse(parsed if isinstance(parsed, tuple) else merge_problems(parsed.merge), tree.place)
    assert isinstance(parsed, MergeFile)
    return parsed.merge


def merge_problems(config: MergeConfig) -> tuple[Problem, ...]:
    """Return all contradictions between keys."""
    takes = METHODS[config.output].get(config.method)
    if takes is None:
        other = "model" if config.output == "adapter" else "adapter"
        known = ", ".join(METHODS[config.output])
        text = f"{config.method} makes no {config.output}; set merge.output to {other}, or take one of {known}"
        return (Problem(key=(*AT, "method"), text=text),)
    return (*_without_effect(config, takes), *_of_models(config, takes), *_of_methods(config, takes))


def in_effect(config: MergeConfig) -> dict[str, Any]:
    """Return the section without keys unknown to the method. Loading the result repeats the merge."""
    takes = METHODS[config.output][config.method]
    skipped = {*_inert(config, takes), *({"tokenizer"} if config.tokenizer is None else ())}
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in skipped}
    for name, values in tree["models"].items():
        tree["models"][name] = {key: value for key, value in values.items() if key in {"model", *takes.per_model}}
    return tree


def _inert(config: MergeConfig, takes: Takes) -> set[str]:
    optional = {"base", "t", "scale", "normalize", "slices", "rank", "seed"} - takes.keys
    return optional | ({"shard_gib"} if config.output == "adapter" else set())


def _without_effect(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    method = f"method {config.method}" + (" on adapters" if config.output == "adapter" else "")
    for key in sorted(_inert(config, takes) & config.model_fields_set):
        if getattr(config, key) not in (None, ()):  # these two values have no meaning
            yield Problem(key=(*AT, key), text=f"has no effect here: {method} takes no {key}; remove it")
    for name, model in config.models.items():
        for key in sorted(model.model_fields_set - {"model"} - takes.per_model):
            text = f"has no effect here: {method} takes no {key}; remove it"
            yield Problem(key=(*AT, "models", name, key), text=text)


def _of_models(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    count = len(config.models)
    if not takes.least <= count <= takes.most:
        wanted = "one model" if takes.most == 1 else f"at least {takes.least} model{'s' * (takes.least > 1)}"
        with_base = " in addition to merge.base" if "base" in takes.keys else ""
        text = f"has {count}, but method {config.method} takes {wanted}{with_base}"
        yield Problem(key=(*AT, "models"), text=text)
    if "base" in takes.keys and config.base is None:
        yield Problem(key=(*AT, "base"), text=f"is missing: method {config.method} needs it; name the common ancestor")
    named = [*config.models, *(["base"] if config.base is not None else [])]
    if config.tokenizer is not None and config.tokenizer not in named:
        yield Problem(key=(*AT, "tokenizer"), text=_no_model(config.tokenizer, named))
    if "base" in config.models:
        yield Problem(key=(*AT, "models", "base"), text="is no valid name, since merge.base has it")


def _of_methods(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    if "scale" in takes.keys and config.scale == 0.0:
        yield Problem(key=(*AT, "scale"), text="is 0, so the result is merge.base; give another factor")
    if "weight" in takes.per_model and config.models and not any(model.weight for model in config.models.values()):
        yield Problem(key=(*AT, "models"), text="every weight is 0, so nothing is merged; give a model another weight")
    elif config.method == "linear" and config.output == "model" and config.normalize is not False:
        total = math.fsum(model.weight for model in config.models.values())
        if abs(total) < 1e-8:
            text = "the weights add up to 0, and linear divides by the sum; change one, or set merge.normalize to false"
            yield Problem(key=(*AT, "models"), text=text)
    densities = {name: model.density for name, model in config.models.items()}
    if config.method in RANDOM and densities and all(density == 1.0 for density in densities.values()):
        text = f"every density is 1, so {config.method} drops nothing; set a density below 1, or take task_arithmetic"
        yield Problem(key=(*AT, "models"), text=text)
    if config.output == "adapter" and "density" in takes.per_model and len(set(densities.values())) > 1:
        text = (
            f"densities differ ({', '.join(f'{n}: {d:g}' for n, d in densities.items())}); adapters share one density"
        )
        yield Problem(key=(*AT, "models"), text=text)
    if "epsilon" in takes.per_model:
        for name, model in config.models.items():
            low, high = model.density - model.epsilon, model.density + model.epsilon
            if model.density < 1.0 and not (low > 0.0 and high < 1.0):
                text = f"{model.density:g} -/+ epsilon {model.epsilon:g} leaves (0, 1); lower epsilon"
                yield Problem(key=(*AT, "models", name, "density"), text=text)
    if config.method == "passthrough":
        yield from _of_slices(config)


def _of_slices(config: MergeConfig) -> Iterator[Problem]:
    if not config.slices:
        text = "is missing: passthrough stacks layers; write [{model: NAME, layers: [0, 8]}, ...]"
        yield Problem(key=(*AT, "slices"), text=text)
        return
    for part in config.slices:
        first, end = part.layers
        if part.model not in config.models:
            yield Problem(key=(*AT, "slices"), text=_no_model(part.model, list(config.models)))
        if first >= end:
            text = f"layers {[first, end]} of {part.model} are empty: the second number is the layer after the last"
            yield Problem(key=(*AT, "slices"), text=text)
    for name in config.models:
        if name not in {part.model for part in config.slices}:
            yield Problem(key=(*AT, "models", name), text="has no effect here: no slice uses its layers; remove it")


def _no_model(name: str, named: Sequence[str]) -> str:
    close = nearest(name, named)
    return f"got {kind(name)}; " + (f"did you mean {close}?" if close else f"the models are {', '.join(named)}")
