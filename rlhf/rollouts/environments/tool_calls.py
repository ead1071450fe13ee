"""Read the policy's tool calls, and describe invalid calls.

A model's output is never an error of the run. An unreadable or invalid call is answered with an error text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# The supported formats with the beginning of a call. Text with this beginning and without a call is malformed.
BEGINNINGS: Mapping[str, re.Pattern[str]] = {
    "hermes": re.compile(r"<tool_call>"),
    "llama3_json": re.compile(r"<\|python_tag\|>|^\s*\{"),
    "pythonic": re.compile(r"^\s*\[\s*\w+\("),
}
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}
_NOT_MADE = "error: not called, since another call of this turn is wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call. `arguments` is JSON text, but may not be a JSON object."""

    name: str
    arguments: str


class ToolCallParser(Protocol):
    def parse(self, text: str) -> tuple[ToolCall, ...] | None:
        """Return the calls, or None if the turn contains an unreadable call."""


def read_calls(
    calls: tuple[ToolCall, ...] | None, tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the calls as `{name, arguments}`, and a list of error texts, empty if all calls are valid.

    With errors there is a text for each call, and no call is made.
    """
    if calls is None:
        return [], ("error: the tool call could not be read",)
    read: list[dict[str, Any]] = []
    problems = []
    for call in calls:
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):  # invalid JSON, or beyond Python's limits of digits and depth
            arguments = None
        read.append({"name": call.name, "arguments": arguments})
        problems.append(_problem(call.name, arguments, tools))
    if not any(problems):
        return read, ()
    return [], tuple(f"error: {problem}" if problem else _NOT_MADE for problem in problems)


def _problem(name: str, arguments: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return why a call does not fit the tool, or an empty string for a valid call."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if name not in functions:
        return f"there is no tool {name!r:.60}; there is {', '.join(functions)}"
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are no object"
    schema = functions[name].get("parameters") or {}
    properties = schema.get("properties") or {}
    missing = [key for key in schema.get("required") or () if key not in arguments]
    if missing:
        return f"{name} lacks the argument {', '.join(missing)}"
    unknown = [key for key in arguments if key not in properties]
    if unknown and not schema.get("additionalProperties"):
        return f"{name} has no argument {', '.join(unknown)[:60]}"
    for key, value in arguments.items():
        definition = properties.get(key)
        wanted = definition.get("type") if isinstance(definition, Mapping) else None  # a definition may be `true`
        if isinstance(wanted, str) and wanted in _TYPES:
            fits = isinstance(value, _TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
            if not fits:
                return f"the argument {key} of {name} must be of type {wanted}"
    return ""
