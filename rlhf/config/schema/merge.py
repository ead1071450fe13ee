"""Define the section of `rlhf merge`: models, a method, and the folder for the result.

MergeConfig has no `out` and can be a stage of a pipeline. rlhf.merging merges the models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.objectives.costs import Dtype
from rlhf.sections import Section

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


class Takes:
    """The keys and the number of models accepted by a method, besides models, output, dtype and tokenizer."""

    def __init__(self, keys: str = "", per_model: str = "", *, least: int = 1, most: float = math.inf) -> None:
        self.keys, self.per_model = frozenset(keys.split()), frozenset(per_model.split())
        self.least, self.most = least, most  # number of models


RANDOM = frozenset({"dare_linear", "dare_ties", "della", "della_linear", "dare_linear_svd", "dare_ties_svd"})
MODEL_METHODS = {
    "linear": Takes("normalize", "weight", least=2),
    "slerp": Takes("base t", most=1),
    "task_arithmetic": Takes("base normalize scale", "weight"),
    "ties": Takes("base normalize scale", "weight density"),
    "dare_linear": Takes("base normalize scale seed", "weight density"),
    "dare_ties": Takes("base normalize scale seed", "weight density"),
    "della": Takes("base normalize scale seed", "weight density epsilon"),
    "della_linear": Takes("base normalize scale seed", "weight density epsilon"),
    "passthrough": Takes("slices"),
    "fold": Takes(most=1),
}
ADAPTER_METHODS = {
    "linear": Takes("", "weight"),
    "cat": Takes("", "weight"),
    "svd": Takes("rank", "weight"),
    "ties": Takes("", "weight density", least=2),  # peft only scales a single adapter, with any method
    "ties_svd": Takes("rank", "weight density", least=2),
    "dare_linear": Takes("seed", "weight density", least=2),
    "dare_linear_svd": Takes("rank seed", "weight density", least=2),
    "dare_ties": Takes("seed", "weight density", least=2),
    "dare_ties_svd": Takes("rank seed", "weight density", least=2),
}
METHODS = {"model": MODEL_METHODS, "adapter": ADAPTER_METHODS}


def in_effect(config: MergeConfig) -> dict[str, Any]:
    """Return the section without keys unknown to the method. Loading the result repeats the merge."""
    takes = METHODS[config.output][config.method]
    skipped = {*without_effect(config, takes), *({"tokenizer"} if config.tokenizer is None else ())}
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in skipped}
    for name, values in tree["models"].items():
        tree["models"][name] = {key: value for key, value in values.items() if key in {"model", *takes.per_model}}
    return tree


def without_effect(config: MergeConfig, takes: Takes) -> set[str]:
    optional = {"base", "t", "scale", "normalize", "slices", "rank", "seed"} - takes.keys
    return optional | ({"shard_gib"} if config.output == "adapter" else set())
