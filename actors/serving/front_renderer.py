"""vLLM's renderer and parsers for the requests of sessions.

A prompt that continues a turn of the session has the sampled tokens, and then the text that the template writes behind
the turn. The parser records the client's view of a response, since the client will send the response in that form.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import has_non_text_content
from vllm.renderers.online_renderer import OnlineRenderer

from actors.serving.captured_sessions import CURRENT_CALL, CapturedSession, KnownTurn, ServedCall
from actors.serving.refusals import RefusedCall
from actors.serving.request_images import RequestImages
from actors.vllm_patches.cut_calls import ToldCalls, parsed_as_stream
from rlhf.agents.calls import Restriction
from rlhf.data.turn_ends import TurnEnds
from rlhf.errors import UserError

LONG_TEXT = 20_000  # characters; tokenizing more takes milliseconds
_PLACE = "qzsentinelzq"  # stands for a turn in a rendered conversation
_UNITS = {"input_tokens": "tokens", "input_text": "characters"}  # by the parameter that vLLM's errors name
_GRAMMARS = ("structured_outputs", "response_format", "text")  # fields of requests that restrict a response
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class SessionRenderer(OnlineRenderer):  # type: ignore[misc]
    """Renders conversations. Every other request is rendered as by vLLM."""

    turn_ends: Collection[int] = ()  # tokens with which the template ends a turn
    model_ends: Collection[int] = ()  # tokens with which the model ends a response
    images: RequestImages | None = None  # None: requests are only text

    @cached_property
    def _ends(self) -> TurnEnds:
        return TurnEnds(self.renderer.get_tokenizer(), self.turn_ends, self.model_ends)

    async def preprocess_chat(self, request: Any, messages: list[Any], *args: Any, **options: Any) -> Any:
        """Return vLLM's input for a conversation, with the keys of images at embedded positions."""
        call = CURRENT_CALL.get()
        call.is_chat = True
        if self.images is not None:
            messages = await asyncio.to_thread(self.images.take, messages)
        elif has_non_text_content(messages):
            raise RefusedCall("`messages` hold more than text, and this model reads only text", param="messages")
        ids: list[int] | None = None
        if call.session is not None:
            _take_limits(request, call)
            call.restriction = asked_restriction(request)
            tools = [options.get("tool_dicts"), request.chat_template_kwargs]
            known = call.session.look_up(call, messages, tools)
            if known is not None and known.end < len(messages):
                ids = await self._continued(call.session, request, messages, known, options)
                if ids is not None:
                    call.session.most_tokens(call, len(ids))
                    request.kv_transfer_params = {"prompt_token_ids": [max(0, i) for i in ids]}  # vLLM renders nothing
                else:
                    call.broke = "rewritten turn"
            elif known is not None:
                call.broke = "open turn"
        _bind_arguments(request)
        asked = {name: getattr(request, name) for name in _GRAMMARS if hasattr(request, name)}
        if self.images is not None and ids is None:
            self.images.refuse_marks(messages)
        read = [{"role": "user", "content": ""}] if ids is not None else self._shown(messages)
        with _ending_session():
            try:
                conversation, (prompt,) = await super().preprocess_chat(request, read, *args, **options)
            except RecursionError as error:
                message = "`messages`, such as the arguments of a call, or `tools` are nested too deeply to be read"
                raise RefusedCall(message, param="messages") from error
        if call.session is not None and call.restriction is None:
            for name, value in asked.items():
                setattr(request, name, value)  # some of vLLM's parsers set a grammar for every request with tools
        if ids is None and self.images is not None:
            ids = self.images.embedded(prompt, messages)
        return conversation, [prompt if ids is None else {"type": "token", "prompt_token_ids": ids}]

    async def preprocess_completion(self, request: Any, *args: Any, **options: Any) -> Any:
        """Return vLLM's inputs for prompts without a template."""
        call, limit = CURRENT_CALL.get(), request.max_tokens
        if call.session is not None:
            _take_limits(request, call)
            call.restriction = asked_restriction(request)
        with _ending_session():
            rendered = await super().preprocess_completion(request, *args, **options)
        request.max_tokens = limit  # vLLM reads it again
        return rendered

    def adjust_harmony_request(self, request: Any) -> None:
        """Refuse sessions of gpt-oss, since vLLM renders such conversations again, without earlier reasoning."""
        if CURRENT_CALL.get().session is not None:
            raise RefusedCall("sessions of gpt-oss are not supported: vLLM renders each of its prompts again")
        super().adjust_harmony_request(request)

    async def _continued(
        self, session: CapturedSession, request: Any, messages: list[Any], known: KnownTurn, options: dict[str, Any]
    ) -> list[int] | None:
        """Return a prompt that continues a known turn. None: the template does not write the turn unchanged."""
        marked = [{"role": "assistant", "content": _PLACE}]
        before, behind = messages[: known.start], messages[known.end :]
        if self.images is not None:
            self.images.refuse_marks(behind)
        tail = _behind(self._render(request, [*before, *marked, *behind], options))
        if tail is None:  # the template wants to see the calls that a tool's results answer
            end = _behind(self._render(request, [*before, *marked], options, is_whole=False))
            told = self._render(request, messages[: known.end], options, is_whole=False)
            whole = self._render(request, messages, options)
            if end is None or told is None or whole is None or not whole.startswith(told):
                return None
            tail = end + whole[len(told) :]
        ids = session.tokens(known)
        encode = partial(self._ends.tokens_behind, ids[-1:], tail, added=known.added)
        try:  # a long text must not keep other requests waiting
            added = await asyncio.to_thread(encode) if len(tail + known.added) > LONG_TEXT else encode()
        except UserError:  # the tokenizer joins the text with any text before it
            return None
        return ids + (added if self.images is None else self.images.expand(added, behind))

    def _shown(self, messages: list[Any]) -> list[Any]:
        return messages if self.images is None else self.images.shown(messages)

    def _render(
        self, request: Any, messages: list[Any], options: dict[str, Any], *, is_whole: bool = True
    ) -> str | None:
        """Return the text of a conversation or of its beginning. None: the template refuses, or writes tokens."""
        params = request.build_chat_params(options["default_template"], options["default_template_content_format"])
        usual = {**(options["default_template_kwargs"] or {}), "tools": options.get("tool_dicts"), "tokenize": False}
        params = params.with_defaults(usual)
        if not is_whole:
            params.chat_template_kwargs["add_generation_prompt"] = False
        try:
            # Not in a thread: waking one takes longer.
            _, rendered = self.renderer.render_messages(self._shown(messages), params)
        except ValueError:
            return None
        text: str | None = rendered.get("prompt")
        return text


@contextmanager
def _ending_session() -> Iterator[None]:
    """Let a prompt beyond the engine's limit end the session, because the session's limit is not higher."""
    try:
        yield
    except VLLMValidationError as error:
        session, unit = CURRENT_CALL.get().session, _UNITS.get(error.parameter or "")
        if session is None or unit is None:
            raise
        raise session.too_long(f"the prompt has {error.value} {unit} or more") from error


def _behind(text: str | None) -> str | None:
    """Return the text after the place of a turn. None: the turn is not there exactly once."""
    parts = [] if text is None else text.split(_PLACE)
    return parts[1] if len(parts) == 2 else None


def _take_limits(request: Any, call: ServedCall) -> None:
    """Accept a client's limit of a response, even above the model's. Leave the arguments of calls free.

    With `strict` a grammar would restrict the policy's writing of a call.
    """
    for name in _TOKEN_LIMITS:
        if (limit := getattr(request, name, None)) is not None:
            if limit < 1:
                raise RefusedCall(f"`{name}` is {limit}, expected at least 1", param=name)
            call.most_tokens = limit
            setattr(request, name, None)
    for tool in getattr(request, "tools", None) or ():  # a prompt without a template has none
        getattr(tool, "function", tool).strict = None


def asked_restriction(request: Any) -> Restriction | None:
    """Return the client's requirement that only a grammar can ensure. None: the policy writes freely."""
    if _is_call_forced(request):
        return "tool_choice"
    if request.extract_structured_outputs() is None:
        return None
    return "response_format" if request.structured_outputs is None else "structured_outputs"


def _is_call_forced(request: Any) -> bool:
    choice = getattr(request, "tool_choice", None)  # a prompt without a template has none
    return choice not in (None, "none", "auto") and getattr(choice, "mode", None) != "auto"


def _bind_arguments(request: Any) -> None:
    """Let the grammar of a required or named call hold the arguments to an object of the tool's schema.

    Without `strict`, vLLM's grammar allows any JSON as arguments.
    """
    if not _is_call_forced(request):
        return
    for tool in request.tools or ():
        function = getattr(tool, "function", tool)
        if hasattr(function, "parameters"):  # a custom tool takes text
            function.strict = True
            given = function.parameters
            function.parameters = {"type": "object", **({"properties": {}} if given is None else given)}


def hearing(parser: Any) -> Any:
    """Return a subclass of vLLM's parser that records the client's view."""

    class HearingParser(parser):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._another = partial(parser, *args, **options)
            self._prompt_ids: Sequence[int] = ()
            self._ids: list[int] = []
            self._content: list[str] = []
            self._calls = ToldCalls()

        def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
            super().set_prompt_token_ids(prompt_token_ids)
            self._prompt_ids = prompt_token_ids

        def parse(self, model_output: str, request: Any, *args: Any, **options: Any) -> Any:
            ids = options["model_output_token_ids"]
            reasoning, content, calls = super().parse(model_output, request, *args, **options)
            if request.tools and request.tool_choice != "none" and CURRENT_CALL.get().was_cut(ids):
                content, calls = parsed_as_stream(self._another(), model_output, ids, request, self._prompt_ids)
            for call in calls or ():
                call.name, call.arguments = _whole(call.name), sendable_arguments(call.arguments)
            pairs = [(call.name, call.arguments) for call in calls or ()]
            _hear(ids, content, pairs, request)
            return reasoning, content, calls

        def parse_delta(self, delta_text: str, delta_token_ids: list[int], *args: Any, **options: Any) -> Any:
            delta = super().parse_delta(delta_text, delta_token_ids, *args, **options)
            self._ids += delta_token_ids
            if delta is not None:
                self._content.append(delta.content or "")
                self._calls.add(delta)
            if options["finished"]:
                request = options["request"] if "request" in options else args[0]
                _hear(self._ids, "".join(self._content), self._calls.pairs(), request)
            return delta

    return HearingParser


def sendable_arguments(text: str) -> str:
    """Return the arguments of a call in a form for every protocol.

    A policy may write numbers outside JSON, which become null, and halves of characters, which become `?`.
    """
    with suppress(ValueError, RecursionError):  # no JSON, or beyond Python's limits of digits and depth
        arguments = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
        if arguments != json.loads(text):  # something became null
            text = json.dumps(arguments, ensure_ascii=False)
    return _whole(text)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()


def _hear(ids: Sequence[int], content: str | None, calls: list[tuple[str, str]], request: Any) -> None:
    told = calls[:1] if request.parallel_tool_calls is False else calls
    CURRENT_CALL.get().hear(np.array(ids, dtype=np.int64), content, told)
