"""Read YAML files and `section.key=value` arguments into plain trees, and record where each key was written.

Scalars follow YAML 1.2: `off` is a string, `1e-6` a number. Nothing here knows the schema.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.yaml_errors import explain_yaml_error
from rlhf.errors import UserError

Key = tuple[str, ...]
MAX_NODES = 100_000
MAX_DEPTH = 100
MAX_MIB = 1

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base declares it so)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base declares it so)


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Hold values as nested dicts, and the place where each key was written."""

    source: str  # the file, for messages
    values: dict[str, Any]
    places: dict[Key, str]
    bases: tuple[Path, ...] = ()  # the files over which this file is merged

    def place(self, key: Key) -> str:
        """Return where the key was written, or else the nearest section above it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.source)

    def section(self, at: Key) -> Tree:
        values = self.values
        for part in at:
            values = values[part]
        places = {key[len(at) :]: place for key, place in self.places.items() if key[: len(at)] == at}
        return replace(self, values=values, places=places)


def read_file(path: Path, *, needs: str) -> Tree:
    """Read one file without the base, or raise UserError with the line to blame. needs: the sections missing from an
    empty file, for the message."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MIB * 2**20 + 1)
        if len(content) > MAX_MIB * 2**20:
            raise UserError(f"{path}: is larger than {MAX_MIB} MiB, the limit of a configuration; is it another file?")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    places: dict[Key, str] = {}
    values = _parse(text, str(path), places, ())
    if values is None:
        raise UserError(f"{path}: the file is empty; {needs}")
    if not isinstance(values, dict):
        raise UserError(f"{path}: the file must hold a mapping of sections, not {kind(values)}")
    return Tree(source=str(path), values=values, places=places)


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return the tree with each `section.key=value` set, and add missing sections. Values are YAML."""
    values, places = copy(tree.values), dict(tree.places)
    seen: list[Key] = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        key = tuple(dotted.strip().split("."))
        place = f"argument {kind(text)}"
        if not equals or not all(key):
            raise UserError(f"{place}: expected section.key=value, such as train.steps=10")
        if len(key) > MAX_DEPTH:
            raise UserError(f"{place}: sections within sections go too deep, beyond {MAX_DEPTH}")
        if key in seen:
            raise UserError(f"{place}: {dotted} is given twice")
        if inner := next((earlier for earlier in seen if earlier[: len(key)] == key), None):
            text = f"{place}: would remove {'.'.join(inner)}, which is given before it"
            raise UserError(f"{text}; give the section first")
        seen.append(key)
        node = values
        for depth, part in enumerate(key[:-1], start=1):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
                places[key[:depth]] = place
            if not isinstance(child, dict):
                raise UserError(f"{place}: {'.'.join(key[:depth])} is {kind(child)}, not a section with keys")
            node = child
        places = {known: at for known, at in places.items() if known[: len(key)] != key} | {key: place}
        node[key[-1]] = _parse(value, place, places, key)
    return replace(tree, values=values, places=places)


def to_yaml(values: dict[str, Any]) -> str:
    """Write values as text. `read_file` and `from_yaml` read the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def from_yaml(text: str) -> Any:
    return _parse(text, "the configuration", {}, ())


def kind(value: object) -> str:
    """Return the value as messages show it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if len(value) > 4 else str(list(value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse(text: str, source: str, places: dict[Key, str], at: Key) -> Any:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: holds the control character {chr(error.character)!r}, which is not YAML") from None
    try:
        node = loader.get_single_node()
        return None if node is None else _Converter(loader, source, places).convert(node, at, ())
    except RecursionError:
        raise UserError(f"{source}: sections within sections go too deep") from None
    except yaml.MarkedYAMLError as error:
        number, reason = explain_yaml_error(error, text)
        line = f":{number}" if number is not None and not source.startswith("argument") else ""
        raise UserError(f"{source}{line}: not valid YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


class _Converter:
    """Turn the nodes of one text into plain values, and record where each key was written."""

    def __init__(self, loader: _Loader, source: str, places: dict[Key, str]) -> None:
        self.loader, self.source, self.places = loader, source, places
        self.num_nodes = 0  # including aliases: a kilobyte of aliases can expand to billions of nodes

    def convert(self, node: yaml.Node, at: Key, parents: tuple[yaml.Node, ...]) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise UserError(f"{self._place(node)}: the text stands for more than {MAX_NODES:,} values; shorten it")
        if len(parents) > MAX_DEPTH:
            raise UserError(f"{self._place(node)}: sections within sections go too deep, beyond {MAX_DEPTH}")
        if any(node is parent for parent in parents):
            raise UserError(f"{self._place(node)}: the alias contains itself")
        parents = (*parents, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(child, at, parents) for child in node.value]
        return self._mapping(node, at, parents) if isinstance(node, yaml.MappingNode) else self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, at: Key, parents: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            key = self.convert(key_node, at, parents)
            if not isinstance(key, str):
                raise UserError(f"{place}: the key {kind(key)} is not a string; put it in quotes")
            if key in result:
                raise UserError(f"{place}: {'.'.join((*at, key))} is given twice")
            self.places[(*at, key)] = place
            result[key] = self.convert(value_node, (*at, key), parents)
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            scalar = self.loader.construct_object(node)
        except ValueError as error:  # an integer with thousands of digits, or an unsuitable tag
            raise UserError(f"{self._place(node)}: {kind(node.value)} is not a value of a config: {error}") from None
        if not isinstance(scalar, str | int | float | None):
            raise UserError(f"{self._place(node)}: {kind(node.value)} as {node.tag} is not a value of a config")
        if isinstance(scalar, str) and any("\ud800" <= character <= "\udfff" for character in scalar):
            try:  # JSON writes an emoji as a pair of escapes
                return scalar.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                text = f"{kind(scalar)} holds half of a character (a lone surrogate)"
                raise UserError(f"{self._place(node)}: {text}") from None
        if isinstance(scalar, float) and not math.isfinite(scalar):
            raise UserError(f"{self._place(node)}: {kind(node.value)} is not a finite number")
        return scalar

    def _place(self, node: yaml.Node) -> str:
        return self.source if self.source.startswith("argument") else f"{self.source}:{node.start_mark.line + 1}"


def copy(value: Any) -> Any:
    return {key: copy(child) for key, child in value.items()} if isinstance(value, dict) else value


def remove(values: dict[str, Any], key: Key) -> None:
    """Remove the key of nested dicts, if the key is there."""
    node: Any = values
    for part in key[:-1]:
        node = node.get(part)
        if not isinstance(node, dict):
            return
    node.pop(key[-1], None)
