"""Walk the classes of the schema: the keys below a section, the alternatives of a union, and their tags.

This module reads types only, neither values nor files.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.config.yaml_tree import Key
from rlhf.sections import Section


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def members(annotation: Any) -> Iterator[Any]:
    """Yield the alternatives of a union, without their annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield annotation


def tag(node: Any) -> str | None:
    """Return pydantic's name for a member of a tagged union in error locations."""
    if is_section(node) and "name" in node.model_fields and get_origin(node.model_fields["name"].annotation) is Literal:
        return str(get_args(node.model_fields["name"].annotation)[0])
    return getattr(node, "__name__", None)


def descend(nodes: Sequence[Any], part: str) -> tuple[list[Any], FieldInfo | None]:
    """Return the types of the key `part` below the nodes, and the field of `part`."""
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


def alternatives(root: type[Section], section: Key) -> list[type[Section]]:
    nodes: list[Any] = [root]
    for part in section:
        nodes, _ = descend(nodes, part)
    return [node for node in nodes if is_section(node)]


def all_keys(root: type[Section], at: Key = (), *, values: Any = None) -> Iterator[Key]:
    """Yield every key below the section `root` at the key `at`, with `*` for a user's name. If the configuration
    `values` selects a section's form by `name`, the keys of all other forms are left out."""
    for name, field in root.model_fields.items():
        yield (*at, name)
        value = values.get(name) if isinstance(values, Mapping) else None
        for member in _selected(list(members(field.annotation)), value):
            if get_origin(member) is dict:
                for inner in members(get_args(member)[1]):
                    if is_section(inner):
                        yield from all_keys(inner, (*at, name, "*"))
            elif is_section(member):
                yield from all_keys(member, (*at, name), values=value)


def _selected(nodes: Sequence[Any], value: Any) -> Sequence[Any]:
    """Return the form selected by the value's `name`, or all forms."""
    name = value.get("name") if isinstance(value, Mapping) else None
    selected = [node for node in nodes if tag(node) == name]
    return selected or nodes
