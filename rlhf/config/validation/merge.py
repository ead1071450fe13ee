"""Check the relations between the keys of a merge section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rlhf.config.mistakes.suggestions import nearest
from rlhf.config.problem import Problem
from rlhf.config.schema.merge import METHODS, RANDOM, MergeConfig, Takes, without_effect
from rlhf.config.yaml_tree import Key, kind

AT: Key = ("merge",)


def merge_problems(config: MergeConfig) -> tuple[Problem, ...]:
    takes = METHODS[config.output].get(config.method)
    if takes is None:
        other = "model" if config.output == "adapter" else "adapter"
        known = ", ".join(METHODS[config.output])
        text = f"{config.method} makes no {config.output}; set merge.output to {other}, or take one of {known}"
        return (Problem((*AT, "method"), text),)
    return (*_without_effect(config, takes), *_of_models(config, takes), *_of_methods(config, takes))


def _without_effect(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    method = f"method {config.method}" + (" on adapters" if config.output == "adapter" else "")
    for key in sorted(without_effect(config, takes) & config.model_fields_set):
        if getattr(config, key) not in (None, ()):  # these two values have no meaning
            yield Problem((*AT, key), f"has no effect here: {method} takes no {key}; remove the key")
    for name, model in config.models.items():
        for key in sorted(model.model_fields_set - {"model"} - takes.per_model):
            yield Problem((*AT, "models", name, key), f"has no effect here: {method} takes no {key}; remove the key")


def _of_models(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    count = len(config.models)
    if not takes.least <= count <= takes.most:
        wanted = "one model" if takes.most == 1 else f"at least {takes.least} model{'s' * (takes.least > 1)}"
        with_base = " in addition to merge.base" if "base" in takes.keys else ""
        yield Problem((*AT, "models"), f"has {count}, but method {config.method} takes {wanted}{with_base}")
    if "base" in takes.keys and config.base is None:
        yield Problem((*AT, "base"), f"is missing: method {config.method} needs it; name the common ancestor")
    named = [*config.models, *(["base"] if config.base is not None else [])]
    if config.tokenizer is not None and config.tokenizer not in named:
        yield Problem((*AT, "tokenizer"), _no_model(config.tokenizer, named))
    if "base" in config.models:
        yield Problem(
            (*AT, "models", "base"), "is not a valid name, because `base` stands for merge.base; choose another name"
        )


def _of_methods(config: MergeConfig, takes: Takes) -> Iterator[Problem]:
    if "scale" in takes.keys and config.scale == 0.0:
        yield Problem((*AT, "scale"), "is 0, so the result is merge.base; give another factor")
    if "weight" in takes.per_model and config.models and not any(model.weight for model in config.models.values()):
        yield Problem((*AT, "models"), "every weight is 0, so nothing is merged; give a model another weight")
    elif config.method == "linear" and config.output == "model" and config.normalize is not False:
        total = math.fsum(model.weight for model in config.models.values())
        if abs(total) < 1e-8:
            text = "the weights add up to 0, and linear divides by the sum; change one, or set merge.normalize to false"
            yield Problem((*AT, "models"), text)
    densities = {name: model.density for name, model in config.models.items()}
    if config.method in RANDOM and densities and all(density == 1.0 for density in densities.values()):
        text = f"every density is 1, so {config.method} drops nothing; set a density below 1, or take task_arithmetic"
        yield Problem((*AT, "models"), text)
    if config.output == "adapter" and "density" in takes.per_model and len(set(densities.values())) > 1:
        text = f"densities differ ({', '.join(f'{n}: {d:g}' for n, d in densities.items())})"
        yield Problem((*AT, "models"), f"{text}; adapters share one density")
    if "epsilon" in takes.per_model:
        for name, model in config.models.items():
            low, high = model.density - model.epsilon, model.density + model.epsilon
            if model.density < 1.0 and not (low > 0.0 and high < 1.0):
                text = f"{model.density:g} -/+ epsilon {model.epsilon:g} leaves (0, 1); lower epsilon"
                yield Problem((*AT, "models", name, "density"), text)
    if config.method == "passthrough":
        yield from _of_slices(config)


def _of_slices(config: MergeConfig) -> Iterator[Problem]:
    if not config.slices:
        text = "is missing: passthrough stacks layers; write [{model: NAME, layers: [0, 8]}, ...]"
        yield Problem((*AT, "slices"), text)
        return
    for part in config.slices:
        first, end = part.layers
        if part.model not in config.models:
            yield Problem((*AT, "slices"), _no_model(part.model, list(config.models)))
        if first >= end:
            text = f"layers {[first, end]} of {part.model} are empty: the second number is the layer after the last"
            yield Problem((*AT, "slices"), text)
    for name in config.models:
        if name not in {part.model for part in config.slices}:
            yield Problem((*AT, "models", name), "has no effect here: no slice uses its layers; remove the key")


def _no_model(name: str, named: Sequence[str]) -> str:
    close = nearest(name, named)
    return f"got {kind(name)}; " + (f"did you mean {close}?" if close else f"the models are {', '.join(named)}")
