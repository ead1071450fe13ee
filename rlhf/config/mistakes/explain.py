"""Explain each mistake in a configuration on one line, and describe the values of a field.

Loading and the documentation use this module for keys and types; rlhf.config.validation.run checks relations.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from rlhf.algorithms import ALGORITHMS
from rlhf.algorithms.custom import custom_config_class
from rlhf.config.mistakes.schema_keys import descend, is_section, tag
from rlhf.config.mistakes.suggestions import choice, example, meant_value, unknown_key
from rlhf.config.preset_settings import with_preset_settings
from rlhf.config.problem import Problem
from rlhf.config.schema.model import has_several_teachers
from rlhf.config.schema.root import Config
from rlhf.config.schema.service import TinkerConfig
from rlhf.config.yaml_tree import Key, kind
from rlhf.errors import UserError
from rlhf.extensions import is_offered
from rlhf.objectives.costs import fast_dtype
from rlhf.role_table import MODEL_SECTIONS
from rlhf.sections import Section

S = TypeVar("S", bound=Section)

_SCALARS: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    types.NoneType: "null",
}


MAX_PROBLEMS = 100  # per message

# Names that pydantic gives to unnamed members of a union in the location of an error.
_MEMBER = re.compile(r"(?:literal|dict|list|tuple|constrained-\w+|function-\w+)\[.*\]|constrained-\w+")


def parse(values: dict[str, Any]) -> Config | tuple[Problem, ...]:
    return parse_as(Config, values)


def parse_as(root: type[S], values: dict[str, Any]) -> S | tuple[Problem, ...]:
    """Parse the tree as typed values without conversions, or return every problem of its keys and types."""
    values = dict(with_preset_settings(values)) if root is Config else values
    has_models = root in (Config, TinkerConfig)
    try:
        form = _form_of(root, values)
    except UserError as error:
        return (Problem(("algorithm", "name"), str(error)),)
    try:
        parsed = form.model_validate_json(json.dumps(_with_dtypes(values) if has_models else values), strict=True)
        return parsed if form is root else cast("S", root.model_construct(parsed.model_fields_set, **dict(parsed)))
    except ValidationError as error:
        problems: dict[Key, Problem] = {}
        missing: dict[Key, Problem] = {}
        for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
            if item["type"] == "extra_forbidden":
                section, _, nodes = _follow(form, item["loc"])
                found = unknown_key(form, values, section, str(item["loc"][-1]), nodes)
            else:
                found = [_wrong_value(form, item["loc"], item["type"], item["input"], item["msg"])]
            for problem in found:
                group = missing if item["type"] == "missing" else problems
                group.setdefault(problem.key, problem)  # each member of a union reports the same key
        meant = {name for problem in problems.values() for name in problem.meant}
        absent = {  # leave out missing keys for which an unknown key probably stands
            key: problem
            for key, problem in missing.items()
            if not any(f"{name}.".startswith(f"{'.'.join(key)}.") for name in meant)
        }
        return tuple((absent | problems).values())


def _form_of(root: type[S], values: dict[str, Any]) -> type[S]:
    """Return the class to parse a tree with: `root`, or a class with the keys of an extension's algorithm."""
    section = values.get("algorithm")
    name = section.get("name") if isinstance(section, dict) else None
    if root is not Config or not isinstance(name, str) or (":" not in name and not is_offered("algorithm", name)):
        return root
    config_class = custom_config_class(name, built_ins=ALGORITHMS)
    return cast("type[S]", create_model(root.__name__, __base__=root, algorithm=(config_class, ...)))


def _with_dtypes(values: dict[str, Any]) -> dict[str, Any]:
    """Write the data type of the run's device into each section of a model of the run without a dtype."""
    cluster = values.get("cluster")
    dtype = fast_dtype(cluster.get("device", "cpu") if isinstance(cluster, dict) else "cpu")
    sections = {name: values[name] for name in MODEL_SECTIONS if isinstance(values.get(name), dict)}
    written: dict[str, Any] = {}
    for name, section in sections.items():
        if has_several_teachers(section):
            held = {teacher: {"dtype": dtype} for teacher, of in section.items() if of.get("url") is None}
            written[name] = {teacher: held.get(teacher, {}) | of for teacher, of in section.items()}
        elif section.get("url") is None:
            written[name] = {"dtype": dtype} | section
    return values | written


def expected(field: FieldInfo) -> str:
    """Describe the values of a field: `a number > 0`, `` `off`, `offline` or `online` ``, `a list of strings`."""
    return _describe(field.annotation, _bounds(field.metadata))


def _follow(root: type[Section], location: Sequence[int | str]) -> tuple[Key, FieldInfo | None, list[Any]]:
    """Return the key for a location of pydantic, the key's field, and the possible types. A location also names members
    of unions, and may end below the wrong key."""
    nodes: list[Any] = [root]
    key: Key = ()
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            nodes = [item for node in nodes for item in get_args(node)[:1] if is_section(item)]
            if not nodes:
                break  # a scalar in a list: the mistake is in the list
            key = (*key, str(part))
            continue
        if _MEMBER.fullmatch(part):
            continue
        candidates = [node for node in nodes if node is not types.NoneType]
        tagged = [node for node in candidates if tag(node) == part]
        below, its_field = descend(nodes, part)
        if tagged and len(candidates) > 1:
            nodes = tagged
        elif below:
            nodes, field, key = below, its_field, (*key, part)
        else:
            break  # an unknown key, or a member of a union of scalars
    return key, field, nodes


def _wrong_value(
    root: type[Section], location: Sequence[int | str], error_type: str, given: Any, message: str
) -> Problem:
    key, field, nodes = _follow(root, location)
    if error_type in ("union_tag_not_found", "union_tag_invalid"):
        expected_tags = choice([tag(node) or "" for node in nodes])
        if key == ("algorithm",):
            expected_tags += ", or your own as `path/file.py:CLASS`"
        key, name = (*key, "name"), given.get("name")
        if error_type == "union_tag_not_found" or field is None:
            return Problem(key, f"is missing: expected {expected_tags}")
        return Problem(key, _not_a_word(key, name, field, expected_tags))
    wanted = expected(field) if field is not None else "a mapping of sections"
    if error_type == "missing" and isinstance(location[-1], int):
        text = f"got too few values, expected {wanted}"
    elif error_type == "missing":
        text = f"is missing: expected {wanted}"
    elif error_type == "value_error":
        text = message.removeprefix("Value error, ")
    elif error_type == "string_pattern_mismatch":
        text = f"got {kind(given)}, expected letters, digits, `.`, `_` and `-`, starting with a letter or digit"
    elif error_type == "string_too_short":
        text = f"got {kind(given)}, expected a string that is not empty"
    elif field is None:
        text = f"got {kind(given)}, expected {wanted}"
    else:
        text = _not_a_word(key, given, field, wanted) + example(key[-1], given, field)
    return Problem(key, text)


def _not_a_word(key: Key, given: Any, field: FieldInfo, wanted: str) -> str:
    meant = meant_value(key, given, field)
    if meant is None:
        return f"got {kind(given)}, expected {wanted}"
    return f"got {kind(given)}; did you mean `{meant}`? Expected {wanted}"


def _describe(annotation: Any, bounds: str = "") -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], _bounds(arguments[1:]) or bounds)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(member, bounds) for member in arguments))
    if origin is Literal:
        return choice([str(argument) for argument in arguments])
    if origin is dict:
        return f"a mapping of names to {_plural(_describe(arguments[1]))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_plural(_describe(arguments[0]))}"
    if origin is tuple:
        item = _describe(arguments[0])
        each = f" (each {item})" if " or " in item else f" {_plural(item)}"
        return f"a list of {len(arguments)}{each}"
    if is_section(annotation):
        return "a mapping"
    return _SCALARS.get(annotation, "any value") + (bounds if annotation in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
    inner = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = [(signs[type(m)][1], getattr(m, signs[type(m)][0])) for m in inner if type(m) in signs]
    bounds = [f"{sign} {bound if isinstance(bound, int) else format(bound, 'g')}" for sign, bound in limits]
    return f" {' and '.join(bounds)}" if bounds else ""


def _plural(words: str) -> str:
    """Make nouns plural: `a string or a mapping` becomes `strings or mappings`."""
    return re.sub(r"(^| or )an? (\w+)", r"\1\2s", words)
