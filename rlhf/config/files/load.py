"""Turn a YAML file and `section.key=value` arguments into checked configurations.

This module opens only the YAML file and the bases, and checks whether files of code exist next to the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.config.derive import model_sections, with_model_sections
from rlhf.config.files.base_file import extend, read_tree
from rlhf.config.files.recipes import config_file
from rlhf.config.mistakes.explain import parse, parse_as
from rlhf.config.mistakes.suggestions import nearest
from rlhf.config.pipeline import CODE, names_code, resolve_stages, texts_at
from rlhf.config.problem import refuse
from rlhf.config.schema.merge import MergeFile, MergeRun
from rlhf.config.schema.root import Config
from rlhf.config.schema.service import TinkerConfig
from rlhf.config.schema.stages import Stage, run_folder
from rlhf.config.validation.merge import merge_problems
from rlhf.config.validation.run import problems
from rlhf.config.validation.service import service_problems
from rlhf.config.yaml_tree import Key, Tree, apply_overrides
from rlhf.errors import UserError
from rlhf.extensions import find_code
from rlhf.objectives.costs import fast_dtype
from rlhf.passed_objects import name_of_code


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """Hold the checked runs in order: a single run, or the stages of a pipeline."""

    source: str  # the file, for messages
    name: str  # name of the run or the pipeline
    folder: Path  # folder of the run, or the parent folder of the stages
    stages: Mapping[str, Stage]  # by stage name; a single run is one stage with the run's name
    is_pipeline: bool
    places: Mapping[Key, str] = field(default_factory=dict)  # where each key was written

    @contextmanager
    def located(self) -> Iterator[None]:
        """Put the place of a key before the message of a UserError about the key."""
        try:
            yield
        except UserError as error:
            place = self._place(str(error))
            if place is None:
                raise
            raise UserError(f"{place}: {error}") from error

    def _place(self, message: str) -> str | None:
        """Return where the key at the start of a message was written, such as `stages.NAME: KEY: ...`."""
        first, second = (*message.split(" ", 2), "")[:2]
        key, below = (tuple(word.rstrip(":").split(".")) for word in (first, second))
        written = self._written(key)
        if self.is_pipeline and key[0] == "stages" and len(key) == 2:
            in_stage, shared = self._written((*key, *below)), self._written(below)
            written = in_stage if len(in_stage) - 2 >= max(len(shared), 1) else shared or written
        return self.places.get(written)

    def _written(self, key: Key) -> Key:
        """Return the key or its nearest written section, or () if there is none."""
        return next((key[:length] for length in range(len(key), 0, -1) if key[:length] in self.places), ())

    @property
    def runs(self) -> Mapping[str, Config]:
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, Config)}


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load and check a configuration. UserError has a line for each mistake: place, key, value, rule, fix."""
    file = config_file(path)
    return resolve(read_tree(file), overrides, file.resolve().parent)


def resolve(tree: Tree, overrides: Sequence[str], folder: Path) -> LoadedConfig:
    """Check a tree as `load` does. Files of code may be relative to `folder`."""
    _refuse_unknown_stages(tree, overrides)
    tree = apply_overrides(tree, overrides)
    if "base" in tree.values:
        raise UserError(f"{tree.place(('base',))}: base: is a key of files only; `rlhf train FILE` names the file")
    _locate_code(tree, folder)
    if "sweep" in tree.values:
        raise UserError(f"{tree.place(('sweep',))}: sweep: is not a section of a run; use `rlhf sweep {tree.source}`")
    if "merge" in tree.values and "stages" not in tree.values:
        raise UserError(f"{tree.place(('merge',))}: merge: is not a section of a run; use `rlhf merge {tree.source}`")
    if "service" in tree.values:
        raise UserError(f"{tree.place(('service',))}: service: is no section of a run; use `rlhf tinker {tree.source}`")
    if "evaluate" in tree.values and "stages" not in tree.values:
        text = "is a stage's section; put it into `stages:`, or evaluate a model with `rlhf eval`"
        raise UserError(f"{tree.place(('evaluate',))}: evaluate: {text}")
    if "stages" in tree.values:
        stages = resolve_stages(tree)
        run = next(iter(stages.values())).run
        name = run.name.partition("/")[0]
        return LoadedConfig(
            source=tree.source, name=name, folder=run.dir / name, stages=stages, is_pipeline=True, places=tree.places
        )
    config = parse(tree.values)
    refuse(config if isinstance(config, tuple) else problems(config), tree.place)
    assert isinstance(config, Config)
    return replace(_single(config, tree.source), places=tree.places)


def _locate_code(tree: Tree, folder: Path) -> None:
    """Make the paths of code files absolute, because the resolved file is in another folder. UserError: the file of an
    algorithm does not exist. Workers on other machines load all other code later."""
    folders = (folder, Path.cwd())
    stages = tree.values.get("stages")
    named = stages.items() if isinstance(stages, dict) else ()
    sections: list[tuple[Key, Any]] = [((), tree.values), *((("stages", name), stage) for name, stage in named)]
    for at, stage in sections:
        for key, section in texts_at(CODE, stage) if isinstance(stage, dict) else ():
            file, _, name = section[key[-1]].rpartition(":")
            there = next((place for place in folders if file and (place / file).is_file()), None)
            if there is not None:
                section[key[-1]] = f"{there / file}:{name}"
            elif file and key == ("algorithm", "name"):
                whole = (*at, *key)
                find_code("algorithm", section["name"], folders=folders, key=f"{tree.place(whole)}: {'.'.join(whole)}")


def from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Return the checked configuration of a mapping with the keys of a file. Paths start at the current folder.

    Where a file names code, a mapping may hold the function, the class or the instance.
    """
    plain = _plain(values, (), {})
    assert isinstance(plain, dict)
    tree = Tree(source="config", values=plain, places=dict.fromkeys(_keys(plain), "config"))
    return resolve(extend(tree, Path.cwd()), overrides, Path.cwd())


def _keys(values: Mapping[str, Any]) -> Iterator[Key]:
    for name, value in values.items():
        yield (name,)
        yield from ((name, *key) for key in (_keys(value) if isinstance(value, Mapping) else ()))


def _plain(value: Any, key: Key, names: dict[int, str]) -> Any:
    """Return a copy limited to YAML values, with the names of objects. UserError names the first unsuitable value."""
    place = ".".join(key) or "config"
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{place}: the key {name!r} is not a string")
        return {name: _plain(inner, (*key, name), names) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*key[:-1], f"{key[-1]}[{index}]"), names) for index, inner in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if names_code(key):
        return name_of_code(value, place, names)
    hint = ". Pass the object of a tracker as rlhf.train(..., trackers=[...])" if "trackers" in key else ""
    raise UserError(f"{place}: is of type {type(value).__name__}, expected a value that a YAML file can contain{hint}")


def checked(config: Config) -> LoadedConfig:
    """Check a configuration built in Python. Each model without a dtype gets that of the device, as from a file."""
    dtype = {"dtype": fast_dtype(config.cluster.device)}
    unset = {key: section for key, section in model_sections(config).items() if "dtype" not in section.model_fields_set}
    config = with_model_sections(config, {key: section.model_copy(update=dtype) for key, section in unset.items()})
    refuse(problems(config), lambda key: "config")
    return _single(config, "config")


def _single(config: Config, source: str) -> LoadedConfig:
    name = config.run.name
    return LoadedConfig(source=source, name=name, folder=run_folder(config), stages={name: config}, is_pipeline=False)


def _refuse_unknown_stages(tree: Tree, overrides: Sequence[str]) -> None:
    stages = tree.values.get("stages")
    names = list(stages) if isinstance(stages, dict) else []
    for text in overrides:
        section, _, rest = text.partition("=")[0].partition(".")
        name = rest.partition(".")[0]
        if section.strip() == "stages" and name not in names:
            close = nearest(name, names)
            stages_text = ", ".join(names) or "none, it is a single run"
            known = f"did you mean {close}?" if close else f"its stages: {stages_text}"
            raise UserError(f"argument {text!r}: {tree.source} has no stage {name!r}; {known}")


_OF_A_RUN = frozenset({"run", "policy", "algorithm", "train", "stages"})  # sections that a merge never has


def load_merge_file(path: str | Path, overrides: Sequence[str] = ()) -> MergeRun:
    """Load and check a YAML file with `merge.key=value` overrides. UserError has a line for each mistake."""
    tree = read_tree(config_file(path), needs="a merge needs the section merge, with method, models and out")
    if "merge" not in tree.values and not tree.values.keys().isdisjoint(_OF_A_RUN):
        raise UserError(f"{tree.source}: is the configuration of a run, not of a merge; use `rlhf train {tree.source}`")
    tree = apply_overrides(tree, overrides)
    parsed = parse_as(MergeFile, tree.values)
    refuse(parsed if isinstance(parsed, tuple) else merge_problems(parsed.merge), tree.place)
    assert isinstance(parsed, MergeFile)
    return parsed.merge


def load_service_file(path: str | Path, overrides: Sequence[str] = ()) -> TinkerConfig:
    """Load and check the file of a server with overrides. UserError has a line for each mistake."""
    tree = read_tree(config_file(path), needs="a server needs the sections run and policy")
    tree = apply_overrides(tree, overrides)
    of_runs = sorted({"algorithm", "data", "train", "stages", "merge", "sweep"} & tree.values.keys())
    if of_runs:
        at = tree.place((of_runs[0],))
        raise UserError(
            f"{at}: {of_runs[0]}: is no section of a server: the clients have their own loops; remove the section"
        )
    parsed = parse_as(TinkerConfig, tree.values)
    refuse(parsed if isinstance(parsed, tuple) else service_problems(parsed), tree.place)
    assert isinstance(parsed, TinkerConfig)
    return parsed
