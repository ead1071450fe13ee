"""An invalid tool call is answered with the mistake; a valid call is handed on."""

from __future__ import annotations

import pytest

from rlhf.rollouts.environments.tool_calls import ToolCall, read_calls

PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "number"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]


def call(arguments: str, name: str = "add") -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def test_calls_that_fit_are_handed_on() -> None:
    read = read_calls((call('{"a": 1, "b": 2.5}'), call('{"a": 2}')), TOOLS)
    assert read == ([{"name": "add", "arguments": {"a": 1, "b": 2.5}}, {"name": "add", "arguments": {"a": 2}}], ())
    assert read_calls((), TOOLS) == ([], ())
    anything = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": True}}}}
    assert read_calls((call('{"a": [1]}'),), [anything]) == ([{"name": "add", "arguments": {"a": [1]}}], ())


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (None, "could not be read"),
        ((call("{}"),), "add lacks the argument a"),
        ((call('{"a": 1, "c": 2}'),), "add has no argument c"),
        ((call('{"a": "1"}'),), "the argument a of add must be of type integer"),
        ((call('{"a": true}'),), "must be of type integer"),
        ((call('"1"'),), "the arguments of add are no object"),
        ((call('{"a": '),), "the arguments of add are no object"),
        ((call("{}", name="sub"),), "there is no tool 'sub'; there is add"),
    ],
)
def test_what_does_not_fit_is_told(made: tuple[ToolCall, ...] | None, answer: str) -> None:
    calls, problems = read_calls(made, TOOLS)
    assert calls == []
    assert answer in problems[0]
    calls, (first, *_) = read_calls((call('{"a": 1}'), *(made or ()), call("{}")), TOOLS)
    assert calls == []
    assert "not called" in first  # one wrong call keeps the others from being made
