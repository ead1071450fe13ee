"""Answer with tool calls truncated at a limit of tokens, as OpenAI's API does.

The answer has the arguments so far, and reports the truncation. Without this fix, vLLM does so only in streams. An
answer in a single part has raw markup instead, or a call that looks complete.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import partial_json_parser
from vllm.entrypoints.generate.base.protocol import FunctionCall


class ToldCalls:
    """The tool calls of a stream so far."""

    def __init__(self) -> None:
        self._calls: dict[int, list[str]] = {}  # name and arguments

    def add(self, delta: Any) -> None:
        """Add the content of one part of a stream."""
        for part in delta.tool_calls or ():
            call = self._calls.setdefault(part.index, ["", ""])
            call[0] += part.function.name or ""
            call[1] += part.function.arguments or ""

    def pairs(self) -> list[tuple[str, str]]:
        """Return the calls as (name, arguments)."""
        return [(name, arguments) for name, arguments in self._calls.values()]


def parsed_as_stream(
    parser: Any, text: str, ids: Sequence[int], request: Any, prompt_ids: Sequence[int]
) -> tuple[str | None, list[FunctionCall]]:
    """Return the content and the calls from a fresh parser of vLLM for a stream of one part and an empty last part.

    With text in the last part, the parser would complete a call without arguments to `{}`.
    """
    calls, contents = ToldCalls(), list[str]()
    for part, part_ids in ((text, [*ids]), ("", list[int]())):
        delta = parser.parse_delta(part, part_ids, request, [*prompt_ids], finished=not part)
        if delta is not None:
            calls.add(delta)
            contents.append(delta.content or "")
    return "".join(contents) or None, [
        FunctionCall(name=name, arguments=arguments) for name, arguments in calls.pairs()
    ]


def ending_as_sampled(
    answer: Callable[..., Awaitable[Any]], cut: Callable[[], Collection[int]]
) -> Callable[..., Awaitable[Any]]:
    """Return vLLM's method for a whole chat answer, with `length` as the end of each truncated response."""

    async def ended(*args: Any, **options: Any) -> Any:
        response = await answer(*args, **options)
        for choice in getattr(response, "choices", ()):  # an error has none
            if choice.index in cut():
                choice.finish_reason = "length"
        return response

    return ended


def with_whole_arguments(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return vLLM's conversion to a message of Anthropic, where the arguments of each call are an object."""

    def converted(response: Any) -> Any:
        for choice in response.choices:
            for call in choice.message.tool_calls:
                call.function.arguments = json.dumps(_closed(call.function.arguments))
        return convert(response)

    return converted


def _closed(arguments: str) -> dict[str, Any]:
    """Return the members of possibly truncated arguments."""
    try:
        value = partial_json_parser.loads(arguments)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
