"""Load and check the file of `rlhf sweep`: a base run, the varied parameters, and the metric.

Trials known in advance are checked here as complete runs; rlhf.sweeps lists the trials. This module starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import derive
from rlhf.config.files.base_file import extend, read_tree
from rlhf.config.files.load import LoadedConfig, resolve
from rlhf.config.files.recipes import PREFIX, config_file
from rlhf.config.mistakes.explain import parse_as
from rlhf.config.mistakes.suggestions import nearest
from rlhf.config.problem import Problem, refuse
from rlhf.config.schema.root import Config
from rlhf.config.schema.sweep import AshaMethod, Parameter, SweepConfig, SweepFile
from rlhf.config.yaml_tree import Key, Tree, apply_overrides, kind
from rlhf.errors import UserError
from rlhf.tracking.metrics.declarations import METRICS, TRAITS, declared
from rlhf.tracking.metrics.reductions import Histogram

AT: Key = ("sweep",)
OWN = ("run.name", "run.dir", "run.mirror", "tracking.wandb_group")  # set by the sweep for each trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Hold a checked sweep and the tree of the base run."""

    source: str  # the file, for messages
    config: SweepConfig
    tree: Tree  # tree of the run with sweep.set applied
    tree_folder: Path  # folder for relative paths of reward files
    base: LoadedConfig  # the run without varied parameters

    @property
    def folder(self) -> Path:
        return self.config.dir / self.config.name

    @property
    def metric(self) -> str:
        return self.config.metric.removeprefix("-")

    @property
    def lower_is_better(self) -> bool:
        return self.config.metric.startswith("-")

    @property
    def judged(self) -> str:
        """Return the name of the last training stage with the metric, or else of the last training stage."""
        names = list(self.base.runs)
        return ([name for name in names if self.metric in _evaluated(self.base.runs[name])] or names)[-1]

    def trial(self, parameters: Mapping[str, Any], name: str) -> LoadedConfig:
        """Return the checked run of a trial. UserError names the invalid parameters."""
        fixed = {"run.name": name, "run.dir": str(self.folder / "trials")}
        if any(stage.tracking.wandb != "off" for stage in self.base.runs.values()):
            fixed["tracking.wandb_group"] = self.config.name
        mirror = next(iter(self.base.stages.values())).run.mirror
        if mirror is not None:
            fixed["run.mirror"] = f"{mirror.rstrip('/')}/{self.config.name}"
        with _blaming(self.source, parameters):
            return resolve(self.tree, arguments({**parameters, **fixed}), self.tree_folder)

    def best(self, parameters: Mapping[str, Any]) -> LoadedConfig:
        """Return the run with the given parameters, for a repetition in the folder of the base run."""
        name = f"{self.base.name}-{self.config.name}"
        return resolve(self.tree, arguments({**parameters, "run.name": name}), self.tree_folder)


@contextmanager
def _blaming(source: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        values = ", ".join(f"{key}={kind(value)}" for key, value in parameters.items())
        text = f"{source}: sweep.parameters: a trial with {values} is not a valid run: {error}"
        raise UserError(text) from error


def arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Load and check a YAML file. `sweep.key=value` changes the sweep, and every other key the base run."""
    path = config_file(path)
    tree = read_tree(path, needs="a sweep needs the section sweep, with name, config, parameters, method and metric")
    if "sweep" not in tree.values and "algorithm" in tree.values:
        raise UserError(f"{tree.source}: is the configuration of a run, not of a sweep; use `rlhf train {tree.source}`")
    of_sweep = [text for text in overrides if text.startswith("sweep.")]
    tree = apply_overrides(tree, of_sweep)
    parsed = parse_as(SweepFile, tree.values)
    refuse(parsed if isinstance(parsed, tuple) else tuple(_problems(parsed.sweep)), tree.place)
    assert isinstance(parsed, SweepFile)
    config = parsed.sweep
    run, folder = _run_tree(config, tree, path)
    of_run = [text for text in overrides if text not in of_sweep]
    given = {text.partition("=")[0].strip() for text in of_run}
    if both := [key for key in given if key in config.parameters]:
        raise UserError(
            f"argument {both[0]}: the sweep varies this key; change the key in sweep.parameters, or remove the key "
            "from the sweep"
        )
    if lost := [(outer, key) for outer in sorted(given) for key in config.set if key.startswith(f"{outer}.")]:
        outer, key = lost[0]
        raise UserError(
            f"argument {outer}: sweep.set gives {key}, and this argument would remove that value; give single keys of "
            f"{outer}"
        )
    fixed = arguments({key: value for key, value in config.set.items() if key not in given})
    run = apply_overrides(apply_overrides(run, fixed), of_run)
    first = {key: next(ends(parameter)) for key, parameter in config.parameters.items()}
    with _blaming(tree.source, first):
        base = resolve(run, arguments(first), folder)
    if not base.runs:
        raise UserError(f"{tree.place((*AT, 'config'))}: sweep.config: no stage of it trains, so nothing can vary")
    sweep = Sweep(source=tree.source, config=config, tree=run, tree_folder=folder, base=base)
    refuse(tuple(_run_problems(sweep)), tree.place)
    return sweep


def ends(parameter: Parameter) -> Iterator[Any]:
    """Yield all values of a parameter, or both ends of the range."""
    if parameter.values is not None:
        yield from parameter.values
        return
    assert parameter.min is not None
    assert parameter.max is not None
    yield from (int(end) if parameter.integer else end for end in (parameter.min, parameter.max))


def _run_tree(config: SweepConfig, tree: Tree, path: Path) -> tuple[Tree, Path]:
    folder = path.resolve().parent
    if isinstance(config.config, dict):
        return extend(tree.section((*AT, "config")), folder), folder
    if config.config.startswith(PREFIX):
        file = config_file(config.config)
        return read_tree(file), file.resolve().parent
    run_file = next((file for file in (Path(config.config), folder / config.config) if file.is_file()), None)
    if run_file is None:
        place = tree.place((*AT, "config"))
        raise UserError(f"{place}: sweep.config: {config.config} is not a file, neither here nor in {folder}")
    return read_tree(run_file), run_file.resolve().parent


def _problems(config: SweepConfig) -> Iterator[Problem]:
    for key, parameter in config.parameters.items():
        at = (*AT, "parameters", key)
        if key in OWN:
            yield Problem(at, "is given to each trial by the sweep; vary another key")
        elif key in config.set:
            yield Problem(at, "is fixed by sweep.set too; remove one of them")
        yield from _of_parameter(parameter, at, is_grid=config.method.name == "grid")
    for key in config.set:
        if key in OWN and key != "run.mirror":  # the mirror of a trial is a folder below the given one
            yield Problem((*AT, "set", key), "is given to each trial by the sweep; remove the key")
    metric = config.metric.removeprefix("-")
    try:
        declared(metric)
    except KeyError:
        close = nearest(metric, list(METRICS))
        hint = f"did you mean {close}?" if close else "see docs/metrics.md"
        yield Problem((*AT, "metric"), f"got {metric!r}, which is not a metric; {hint}")
        return
    if declared(metric).reduction is Histogram:
        yield Problem((*AT, "metric"), f"got {metric!r}, a histogram; name a metric that is a number")


def _of_parameter(parameter: Parameter, at: Key, *, is_grid: bool) -> Iterator[Problem]:
    if parameter.values is not None:
        for name in sorted(parameter.model_fields_set - {"values"}):
            yield Problem((*at, name), "has no effect together with `values`; remove one of them")
        if not parameter.values:
            yield Problem((*at, "values"), "is empty; name at least one value")
        return
    if parameter.min is None or parameter.max is None:
        yield Problem(at, "expected `values: [...]`, or `min` and `max`")
        return
    if parameter.min >= parameter.max:
        yield Problem((*at, "max"), f"is {parameter.max:g} and must be above min = {parameter.min:g}")
    elif parameter.scale == "log" and parameter.min <= 0.0:
        yield Problem((*at, "min"), f"is {parameter.min:g}, and a log scale needs a number above 0")
    if parameter.scale == "log" and parameter.step is not None:
        yield Problem((*at, "step"), "has no effect on a log scale; remove the key, or write `values`")
    whole = all(number is None or number == int(number) for number in (parameter.min, parameter.max, parameter.step))
    if parameter.integer and not whole:
        yield Problem((*at, "integer"), "is true, but min, max or step is not a whole number")
    if is_grid and (parameter.scale == "log" or (parameter.step is None and not parameter.integer)):
        yield Problem(at, "is an infinite range, and a grid tries every number; write `values`, or a step")


def _run_problems(sweep: Sweep) -> Iterator[Problem]:
    metric, stages = sweep.metric, sweep.base.runs
    known = [name for stage in stages.values() for name in _evaluated(stage)]
    splits = any(stage.eval.by is not None for stage in stages.values())
    if metric.startswith("eval/") and metric not in known and not splits:
        close = nearest(metric, known)
        has = f"did you mean {close}?" if close else f"the run has {', '.join(known) or 'no evaluation: set data.eval'}"
        yield Problem((*AT, "metric"), f"got {metric!r}; {has}")
        return
    judged = stages[sweep.judged]
    yield from _of_absent_metric(metric, judged)
    method = sweep.config.method
    if isinstance(method, AshaMethod):
        at, first = (*AT, "method", "grace_steps"), method.grace_steps
        if judged.train.steps is None:
            text = "is asha, which counts steps, but the run has train.epochs; give it train.steps instead"
            yield Problem((*AT, "method"), text)
        elif first >= judged.train.steps:
            yield Problem(at, f"is {first}, but a trial has only {judged.train.steps} steps (train.steps); lower it")
        elif metric.startswith("eval/") and first % judged.eval.every:
            yield Problem(at, f"is {first}, but {metric} is measured every {judged.eval.every} steps only (eval.every)")


def _of_absent_metric(metric: str, stage: Config) -> Iterator[Problem]:
    at, declaration = (*AT, "metric"), declared(metric)
    if absent := sorted(declaration.traits - derive.traits(stage)):
        yield Problem(at, f"got {metric!r}, which this run does not record. It is for runs with: {TRAITS[absent[0]]}")
        return
    name = (declaration.placeholders(metric) or {}).get("name")
    if name is not None and name not in stage.rewards:
        yield Problem(at, f"got {metric!r}, but the rewards of the run are: {', '.join(stage.rewards)}")


def _evaluated(stage: Config) -> list[str]:
    of_sets = [f"eval/{name}/{metric}" for name in derive.eval_sets(stage) for metric in derive.eval_metrics(stage)]
    return of_sets + [f"eval/{name}/score" for name in stage.eval.suites]
