"""Decide whether a section replaces the section below: a section of another kind shares no keys with it.

Files over a base and stages over shared sections are merged by the same rules.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from pydantic.fields import FieldInfo

from rlhf.config.mistakes.schema_keys import descend
from rlhf.config.schema.data import SOURCES
from rlhf.config.schema.model import has_several_teachers
from rlhf.config.schema.root import Config
from rlhf.config.yaml_tree import Key

_KINDS_OF_REWARDS = ("function", "url", "role", "environment")
_KINDS_OF_AGENTS = ("function", "command", "url")
_SELECTED_BY_NAME = ("algorithm", "environment", "method")


def selects_another(key: Key, below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Return whether a section and the section below differ in kind, so that no key below applies."""
    if key[-2:-1] == ("rewards",):
        selectors: tuple[str, ...] = _KINDS_OF_REWARDS
    elif key[-1] == "agent":
        selectors = _KINDS_OF_AGENTS
    elif key[-1] == "teacher" and (len(key) == 1 or (key[0] == "stages" and len(key) == 3)):
        return has_several_teachers(below) != has_several_teachers(above)
    elif key[-1] in _SELECTED_BY_NAME:
        selectors = ("name",)
    elif {"train", "eval", "data"}.intersection(key[-2:]) and key[-1] != "columns" and SOURCES.keys() & (below | above):
        if not SOURCES.keys() & above:
            return not any(mark in below and above.keys() <= form.model_fields.keys() for mark, form in SOURCES.items())
        selectors = tuple(SOURCES)
    else:
        return False
    return any(name in above and _value(above[name], below, (*key, name)) != below.get(name) for name in selectors)


def _value(written: Any, below: dict[str, Any], key: Key) -> Any:
    """Return the value of a key: the default, if null drops the value below."""
    if written is not None or not takes_back(below, key):
        return written
    _, field = _field(key)
    return below[key[-1]] if field is None or field.is_required() else field.get_default(call_default_factory=True)


def takes_back(below: dict[str, Any], key: Key) -> bool:
    """Return whether null at the key takes back the value below. For a key with null as a value, null is the value."""
    nodes, _ = _field(key)
    return key[-1] in below and NoneType not in nodes


def _field(key: Key) -> tuple[list[Any], FieldInfo | None]:
    nodes: list[Any] = [Config]
    field = None
    for part in key[2:] if key[0] == "stages" else key:
        nodes, field = descend(nodes, part)
    return nodes, field
