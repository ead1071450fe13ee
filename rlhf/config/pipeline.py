"""Stages of a pipeline as complete runs.

Rules (docs/configuration.md repeats them for users):
1. Sections at the top are shared: each stage gets them, merged key by key under its own, which win.
2. A shared key that a stage cannot use is not given to that stage. One that no stage uses is an error.
3. `run` stands at the top alone; a stage's run is called PIPELINE/STAGE. `algorithm` stands in each stage.
4. `stage:NAME` as a model or adapter is the final model or adapter of an earlier stage.
5. All stages run in one Ray: cluster.address and cluster.object_store_gib are the same in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.checks import problems, unused
from rlhf.config.explain import Problem, nearest, parse, refuse
from rlhf.config.root import Config
from rlhf.config.run import RunConfig
from rlhf.config.yaml_tree import Key, Tree, copy, kind

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Where `stage:NAME` may stand.
MODELS = (
    ("policy", "model"),
    ("policy", "adapter"),
    ("reference", "model"),
    ("teacher", "model"),
    ("critic", "model"),
    ("critic", "adapter"),
    ("reward", "model"),
)


@dataclass(slots=True, kw_only=True)
class _Stage:
    """One stage while its tree is put together."""

    name: str
    own: dict[str, Any]  # what stands under stages.NAME
    values: dict[str, Any]  # merged over the shared sections
    dropped: dict[Key, str] = field(default_factory=dict)  # shared keys that it cannot use, and why

    def shown(self, problem: Problem, shared: dict[str, Any]) -> Problem:
        """The problem with its key as the file has it."""
        if problem.key[0] == "run" or (not _has(self.own, problem.key) and _has(shared, problem.key)):
            return problem
        return Problem(key=("stages", self.name, *problem.key), text=problem.text)

    def why_dropped(self, leaf: Key) -> tuple[Key, str] | None:
        """The shared key (the leaf or a section around it) that the stage cannot use, and why; None: it can."""
        return next(((key, why) for key, why in self.dropped.items() if leaf[: len(key)] == key), None)

    def uses(self, leaf: Key) -> bool:
        """Whether the shared leaf stands in the stage's configuration."""
        node: Any = self.own
        for part in leaf:
            if not isinstance(node, dict):
                return False
            if part not in node:
                return self.why_dropped(leaf) is None
            node = node[part]
        return False


def resolve_stages(tree: Tree) -> dict[str, Config]:
    """Each stage's checked configuration, in order. UserError names every mistake."""
    refuse(list(_misplaced(tree)), tree.place)
    shared = {key: value for key, value in tree.values.items() if key not in ("stages", "run")}
    run: Any = tree.values.get("run", {})
    found: dict[Problem, None] = {}
    stages: list[_Stage] = []
    configs: dict[str, Config] = {}
    for name, own in tree.values["stages"].items():
        stage = _Stage(name=name, own=own or {}, values=_merge(shared, own or {}))
        named = isinstance(run, dict) and isinstance(run.get("name"), str)
        stage.values["run"] = {**run, "name": f"{run['name']}/{name}"} if named else run
        config = _complete(stage, [earlier.name for earlier in stages], list(tree.values["stages"]))
        if isinstance(config, Config):
            configs[name] = config
        else:
            found |= {stage.shown(problem, shared): None for problem in config}
        stages.append(stage)
    refuse(list(found) or [*_unused_by_all(shared, stages), *_several_clusters(configs)], tree.place)
    return configs


def _misplaced(tree: Tree) -> Iterator[Problem]:
    stages = tree.values["stages"]
    if not isinstance(stages, dict) or not stages:
        yield Problem(key=("stages",), text=f"got {kind(stages)}, expected a mapping of stage names to their sections")
        return
    run = tree.values.get("run")
    if isinstance(run, dict) and "/" in str(run.get("name")):
        yield Problem(key=("run", "name"), text=f"got {kind(run['name'])}, expected a name without `/` for a pipeline")
    if "algorithm" in tree.values:
        text = f"stands in each stage, not at the top: write stages.{next(iter(stages))}.algorithm"
        yield Problem(key=("algorithm",), text=text)
    for name, own in stages.items():
        if not _NAME.fullmatch(name):
            text = "is no name for a stage: letters, digits, `_` and `-`, starting with a letter or digit"
            yield Problem(key=("stages", name), text=text)
        if own is not None and not isinstance(own, dict):
            yield Problem(key=("stages", name), text=f"got {kind(own)}, expected a mapping of sections")
        elif own is not None and "run" in own:
            text = "stands at the top, for all stages; a stage's run is called after the pipeline and the stage"
            yield Problem(key=("stages", name, "run"), text=text)


def _complete(stage: _Stage, earlier: list[str], names: list[str]) -> Config | tuple[Problem, ...]:
    """The stage's configuration without the shared keys that it cannot use, or what is wrong with it."""
    while True:
        config = parse(stage.values)
        if not isinstance(config, Config):
            return config
        useless = [problem for problem in unused(config) if not _has(stage.own, problem.key)]
        if not useless:
            break
        for problem in useless:
            _remove(stage.values, problem.key)
            stage.dropped[problem.key] = problem.text.partition(": ")[2]  # without "has no effect here"
    wrong = tuple(_link_models(stage, config.run, earlier, names))
    linked = wrong or parse(stage.values)
    return (problems(linked) or linked) if isinstance(linked, Config) else linked


def _link_models(stage: _Stage, run: RunConfig, earlier: list[str], names: list[str]) -> Iterator[Problem]:
    """Puts the folder of an earlier stage's final model in the place of `stage:NAME`."""
    for section, key in MODELS:
        values = stage.values.get(section) or {}
        wanted = str(values.get(key)).removeprefix("stage:")
        if not str(values.get(key)).startswith("stage:"):
            continue
        if wanted in earlier:
            values[key] = str(run.dir / Path(run.name).parent / wanted / "final")
            continue
        rule = f"stage {wanted} does not run earlier" if wanted in names else f"there is no stage {wanted}"
        close = nearest(wanted, earlier)
        known = f"did you mean stage:{close}?" if close else f"earlier stages: {', '.join(earlier) or 'none'}"
        yield Problem(key=(section, key), text=f"got 'stage:{wanted}', but {rule}; {known}")


def _several_clusters(configs: dict[str, Config]) -> Iterator[Problem]:
    """One command connects to one Ray; device and roles may differ from stage to stage."""
    first = next(iter(configs.values())).cluster
    for name, config in configs.items():
        for key in ("address", "object_store_gib"):
            value, wanted = getattr(config.cluster, key), getattr(first, key)
            if value != wanted:
                differ = f"is {kind(value)} here and {kind(wanted)} in stage {next(iter(configs))}"
                text = f"{differ}: all stages run in one Ray; write cluster.{key} at the top"
                yield Problem(key=("stages", name, "cluster", key), text=text)


def _unused_by_all(shared: dict[str, Any], stages: list[_Stage]) -> Iterator[Problem]:
    named: set[Key] = set()
    for leaf in _leaves(shared):
        if any(stage.uses(leaf) for stage in stages):
            continue
        reasons = [reason for stage in stages if (reason := stage.why_dropped(leaf)) is not None]
        key, why = reasons[-1] if reasons else (leaf, "")  # the last stage's: it is the one that matters most
        if key not in named:
            named.add(key)
            own = f"has no effect: every stage sets its own; write stages.{stages[-1].name}.{'.'.join(leaf)}"
            yield Problem(key=key, text=f"no stage can use it: {why}" if reasons else own)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = copy(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else copy(value)
    return merged


def _has(values: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _remove(values: dict[str, Any], key: Key) -> None:
    for part in key[:-1]:
        values = values[part]
    del values[key[-1]]


def _leaves(values: dict[str, Any], at: Key = ()) -> Iterator[Key]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key)
