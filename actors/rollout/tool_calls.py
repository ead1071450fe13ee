"""Tool calls read by vLLM's parsers. Each parser knows one model family's format.

vLLM is imported when a parser is created: an engine's process has already loaded vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import RunError
from rlhf.rollouts.environments.tool_calls import BEGINNINGS, ToolCall


class VllmToolCalls:
    """A `ToolCallParser`. RunError if the tokenizer lacks a token of the format."""

    def __init__(self, name: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)  # a malformed call is no error here
        self._beginning = BEGINNINGS[name]
        self._request = ChatCompletionRequest(model="", messages=[], tools=list(tools))
        try:
            self._parser = ToolParserManager.get_tool_parser(name)(tokenizer, self._request.tools)
        except (ValueError, RuntimeError) as error:
            raise RunError(
                f"rollouts.environment.tool_parser: {name} does not fit the tokenizer of {tokenizer.name_or_path}: "
                f"{error}. Choose the format that the model was trained on: {', '.join(BEGINNINGS)}."
            ) from error

    def parse(self, text: str) -> tuple[ToolCall, ...] | None:
        """Return the turn's tool calls, or an empty tuple without calls. None: a call begins but cannot be parsed."""
        result = self._parser.extract_tool_calls(text, self._request)
        if result.tools_called:
            return tuple(ToolCall(name=c.function.name, arguments=c.function.arguments) for c in result.tool_calls)
        return None if self._beginning.search(text) else ()
