"""Mistakes in a configuration as one line each, and what a field expects, in words.

Used by load and by the documentation. Knows the schema's shape, not its meaning: relations stand in rlhf.config.checks.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.algorithms.section import Section
from rlhf.config.root import Config
from rlhf.config.yaml_tree import Key, kind
from rlhf.errors import UserError

S = TypeVar("S", bound=Section)

_SCALARS: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    types.NoneType: "null",
}


# How pydantic calls a member of a union that has no name of its own, in an error's location.
_MEMBER = re.compile(r"(?:literal|dict|list|tuple|constrained-\w+|function-\w+)\[.*\]|constrained-\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: the key to blame first, and values, rule and fix in words."""

    key: Key
    text: str


def parse(values: dict[str, Any]) -> Config | tuple[Problem, ...]:
    """The tree as the configuration of a run, or everything that is wrong with it."""
    return parse_as(Config, values)


def parse_as(root: type[S], values: dict[str, Any]) -> S | tuple[Problem, ...]:
    """The tree as typed values, or everything that is wrong with its keys and types. Nothing is converted: a number in
    quotes is a string."""
    try:
        return root.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        found: dict[Key, Problem] = {}
        for item in error.errors(include_url=False):
            key, text = _line_of_error(root, item["loc"], item["type"], item["input"], item["msg"])
            found.setdefault(key, Problem(key=key, text=text))  # each member of a union reports the same key
        return tuple(found.values())


def refuse(problems: Sequence[Problem], place: Callable[[Key], str]) -> None:
    """UserError with a line for each problem, if there is one."""
    if problems:
        raise UserError("\n".join(f"{place(p.key)}: {'.'.join(p.key)}: {p.text}" for p in problems))


def expected(field: FieldInfo) -> str:
    """The values that a field takes: `a number > 0`, `` `off`, `offline` or `online` ``, `a list of strings`."""
    return _describe(field.annotation, _bounds(field.metadata))


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, without their annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation


def is_section(annotation: object) -> bool:
    """Whether it is a class of the schema."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _line_of_error(
    root: type[Section], location: Sequence[int | str], error_type: str, given: Any, message: str
) -> tuple[Key, str]:
    """One of pydantic's errors as (key, what is wrong with it)."""
    nodes: list[Any] = [root]
    key: Key = ()
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            nodes = [item for node in nodes for item in get_args(node)[:1] if is_section(item)]
            if not nodes:
                break  # a scalar in a list: the list is to blame
            key = (*key, str(part))
            continue
        if _MEMBER.fullmatch(part):
            continue
        alternatives = [node for node in nodes if node is not types.NoneType]
        tagged = [node for node in alternatives if _tag(node) == part]
        below, its_field = _descend(nodes, part)
        if tagged and len(alternatives) > 1:
            nodes = tagged
        elif below:
            nodes, field, key = below, its_field, (*key, part)
        elif error_type == "extra_forbidden":
            return (*key, part), _unknown(root, key, part, nodes)
        else:
            break  # a member of a union of scalars
    if error_type == "union_tag_not_found":
        return (*key, "name"), f"is missing: expected {_choice([_tag(node) or '' for node in nodes])}"
    if error_type == "union_tag_invalid":
        return (*key, "name"), f"got {kind(given['name'])}, expected {_choice([_tag(node) or '' for node in nodes])}"
    wanted = expected(field) if field is not None else "a mapping of sections"
    if error_type == "missing" and isinstance(location[-1], int):
        return key, f"got too few values, expected {wanted}"
    if error_type == "missing":
        return key, f"is missing: expected {wanted}"
    if error_type == "value_error":
        return key, message.removeprefix("Value error, ")
    if error_type == "string_pattern_mismatch":
        return key, f"got {kind(given)}, expected letters, digits, `.`, `_` and `-`, starting with a letter or digit"
    if error_type == "string_too_short":
        return key, f"got {kind(given)}, expected a string that is not empty"
    return key, f"got {kind(given)}, expected {wanted}"


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The word that was probably meant."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return close[0] if close else None


def all_keys(root: type[Section], at: Key = ()) -> Iterator[Key]:
    """Every key of the schema; below a mapping the name stands as `*`."""
    for name, field in root.model_fields.items():
        yield (*at, name)
        for member in members(field.annotation):
            inner = member
            below = (*at, name)
            if get_origin(member) is dict:
                inner, below = get_args(member)[1], (*below, "*")
            if is_section(inner):
                yield from all_keys(inner, below)


def _unknown(root: type[Section], section: Key, word: str, nodes: Sequence[Any]) -> str:
    names = [name for node in nodes if is_section(node) for name in node.model_fields]
    others = [node for node in _alternatives(root, section) if node not in nodes and word in node.model_fields]
    if others:  # a key of another form of this section, such as another algorithm's
        ours, owners = (_choice([_tag(node) or "" for node in some]) for some in (nodes, others))
        return f"is a key of {owners}; {ours} has {', '.join(sorted(set(names)))}"
    here = nearest(word, names)
    if here:
        return f"unknown key; did you mean {'.'.join((*section, here))}?"
    elsewhere = [key for key in all_keys(root) if not section or key[: len(section)] != section]
    elsewhere.sort(key=lambda key: len(_alternatives(root, key[:-1])) > 1)  # what every run has comes first
    everywhere = {key[-1]: ".".join(key) for key in reversed(elsewhere)}
    there = word if word in everywhere else nearest(word, list(everywhere))
    if there:
        return f"unknown key; did you mean {everywhere[there]}?"
    return f"unknown key; {'.'.join(section) or 'the file'} has {', '.join(sorted(set(names)))}"


def _alternatives(root: type[Section], section: Key) -> list[Any]:
    """All forms that the section at a key may have."""
    nodes: list[Any] = [root]
    for part in section:
        nodes, _ = _descend(nodes, part)
    return [node for node in nodes if is_section(node)]


def _descend(nodes: Sequence[Any], part: str) -> tuple[list[Any], FieldInfo | None]:
    """What may stand at the key `part` of the nodes, and the field that says so."""
    below: list[Any] = []
    field: FieldInfo | None = None
    for node in nodes:
        if is_section(node) and part in node.model_fields:
            field = field or node.model_fields[part]
        elif get_origin(node) is dict:
            field = field or FieldInfo(annotation=get_args(node)[1])
        else:
            continue
        below += members(field.annotation)
    return below, field


def _tag(node: Any) -> str | None:
    """What pydantic calls a member of a tagged union in an error's location."""
    if is_section(node) and "name" in node.model_fields and get_origin(node.model_fields["name"].annotation) is Literal:
        return str(get_args(node.model_fields["name"].annotation)[0])
    return getattr(node, "__name__", None) if not is_section(node) else str(node.__name__)


def _describe(annotation: Any, bounds: str = "") -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], _bounds(arguments[1:]) or bounds)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(member, bounds) for member in arguments))
    if origin is Literal:
        return _choice([str(argument) for argument in arguments])
    if origin is dict:
        return f"a mapping of names to {_plural(_describe(arguments[1]))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_plural(_describe(arguments[0]))}"
    if origin is tuple:
        one = _describe(arguments[0])
        each = f" (each {one})" if " or " in one else f" {_plural(one)}"
        return f"a list of {len(arguments)}{each}"
    if is_section(annotation):
        return "a mapping"
    return _SCALARS.get(annotation, "any value") + (bounds if annotation in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
    inner = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [(signs[type(m)][1], getattr(m, signs[type(m)][0])) for m in inner if type(m) in signs]
    bounds = [f"{sign} {bound if isinstance(bound, int) else format(bound, 'g')}" for sign, bound in found]
    return f" {' and '.join(bounds)}" if bounds else ""


def _choice(words: Sequence[str]) -> str:
    quoted = [f"`{word}`" for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _plural(words: str) -> str:
    """`a string or a mapping` as `strings or mappings`."""
    return re.sub(r"(^| or )an? (\w+)", r"\1\2s", words)
