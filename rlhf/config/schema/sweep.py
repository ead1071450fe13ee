"""Define the section of `rlhf sweep`: a base run, the varied parameters, and the metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlhf.config.schema.run import Folder
from rlhf.sections import Section


class Parameter(Section):
    """Values of a key: a list `values`, or the numbers from `min` to `max`."""

    values: tuple[Any, ...] | None = None
    """The choices, of any type allowed for the key. null: a range."""
    min: float | None = None
    """Smallest number of a range."""
    max: float | None = None
    """Largest number of a range."""
    scale: Literal["linear", "log"] = "linear"
    """log: draw the logarithm uniformly, as suits learning rates."""
    step: float | None = Field(default=None, gt=0.0)
    """Distance between the numbers of a linear range. null: any number in the range."""
    integer: bool = False
    """Use whole numbers only."""


class GridMethod(Section):
    """All combinations of values. A range needs `step` or `integer`."""

    name: Literal["grid"]
    """Method."""


class RandomMethod(Section):
    """Independent draws. The first n draws do not depend on the number of trials."""

    name: Literal["random"]
    """Method."""
    trials: int = Field(ge=1, le=10_000)
    """Number of runs."""


class BayesianMethod(Section):
    """Draws near earlier good trials (Optuna's TPE through Ray Tune). The method needs the extra `sweeps`."""

    name: Literal["bayesian"]
    """Method."""
    trials: int = Field(ge=1, le=10_000)
    """Number of runs. The first ten are random draws."""


class AshaMethod(Section):
    """Random draws, with early stopping of the worse trials (asynchronous successive halving, arXiv:1810.05934)."""

    name: Literal["asha"]
    """Method."""
    trials: int = Field(ge=1, le=10_000)
    """Number of runs to start."""
    grace_steps: int = Field(ge=1)
    """Steps of a trial before the first comparison. Later comparisons are at this number times powers of
    reduction_factor."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """At each comparison, one in this many trials continues, namely the best trials."""


Method = GridMethod | RandomMethod | BayesianMethod | AshaMethod


class SweepConfig(Section):
    """Runs with different values of some keys, and the metric that compares runs. All files are in `<dir>/<name>/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the sweep below `dir`, and the W&B group of the trials."""
    dir: Folder = Field(default=Path("sweeps"), validate_default=False)
    """Folder for sweeps. A leading `~` is your home folder."""
    config: str | dict[str, Any]
    """The run to vary: a file for `rlhf train`, relative to the current folder or to this file, or the sections
    themselves."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run to change in every trial, such as `train.steps: 20`."""
    parameters: dict[str, Parameter] = Field(min_length=1)
    """Parameters to vary, by key of the run (`train.lr`)."""
    method: Method = Field(discriminator="name")
    """How trials are chosen."""
    metric: str = Field(min_length=1)
    """The metric for comparing trials, by the last value. A leading `-` means lower is better."""
    concurrency: int | None = Field(default=None, ge=1)
    """Number of trials at once. null: as many as fit on the machine or the cluster."""
    max_failures: int | None = Field(default=None, ge=0)
    """Number of failed trials that the sweep allows. After more failures no further trial starts. null: unlimited."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the draws. The runs use `run.seed`."""


class SweepFile(Section):
    """A file for `rlhf sweep`."""

    sweep: SweepConfig
    """The sweep."""
