"""The entrance of the front: the session of a request, the allowed fields, and the allowed length.

The gateway is an ASGI application around vLLM's. The key of a session comes as the API key of OpenAI's or Anthropic's
clients, or in the path of the base URL: /s/KEY/v1/...
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from actors.serving.captured_sessions import CURRENT_CALL, CapturedSession, CapturedSessions, OpenRequest, ServedCall
from actors.serving.refusals import DRAWING, RESPONSES_PATH, RefusedCall, refuse_route, refuse_unsupported
from rlhf.agents.limits import MAX_REQUEST_BYTES, SessionLimits
from rlhf.serving import BODY_S, is_same_secret

MAX_RESPONSES = 128  # of one request
MAX_DEPTH = 60  # of a session's body: vLLM does not end with deeper schemas
REFUSED_AFTER_S = 1.0
MAX_HELD = 1024  # refusals that wait; others are sent at once
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(slots=True, eq=False, kw_only=True)
class Gateway:
    """Lets calls of open sessions through, and without capture also calls with the server's own key."""

    app: Callable[[Scope, Receive, Send], Awaitable[None]]  # vLLM's ASGI application
    sessions: CapturedSessions
    fields: Mapping[str, Collection[str]]  # of vLLM's requests, by path
    own_key: str | None  # of calls with the client's settings; None: no such calls
    name: str  # the only model of calls with `own_key`; sessions may name any model
    has_tool_parser: bool
    check_item: Callable[[Any], object]  # raises ValueError for an invalid item of the field `input`
    _serial: int = field(default=0, init=False)
    _num_held: int = field(default=0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. To slow repeated calls, a refusal is sent late, unless the key is the server's own."""
        path, key = scope["path"], _header_key(scope)
        if path.startswith("/s/"):
            key, _, rest = path[len("/s/") :].partition("/")
            path = f"/{rest}"
        answer = _Answer(send, path)
        is_own = self.own_key is not None and is_same_secret(key, self.own_key)
        try:
            async with nullcontext() if is_own else self.sessions.find(key).request() as request:
                refuse_route(scope["method"], path)
                await self._serve({**scope, "path": path, "raw_path": path.encode()}, request, receive, answer)
        except RefusedCall as error:
            if not is_own and self._num_held < MAX_HELD:
                self._num_held += 1
                try:
                    await asyncio.sleep(REFUSED_AFTER_S)
                finally:
                    self._num_held -= 1
            if not answer.has_begun:  # otherwise the server closes the connection
                await _send_error(error, path, send, closes=True)  # the rest of the client's body is not read

    async def _serve(self, scope: Scope, request: OpenRequest | None, receive: Receive, send: Send) -> None:
        path, session = scope["path"], None if request is None else request.session
        body, asked = b"", {}
        if scope["method"] == "POST":
            body = await _read(receive, request)
            asked = _parsed(body, None if session is None else session.limits)
        self._check(asked, session, path)
        with self._call(asked, session, path) as call:
            CURRENT_CALL.set(call)
            await self.app(scope, _replay(body, receive), send)

    def _call(
        self, asked: Mapping[str, Any], session: CapturedSession | None, path: str
    ) -> AbstractContextManager[ServedCall]:
        num_responses = _num_responses(asked)
        if session is not None and path in DRAWING:
            return session.call(num_responses)
        self._serial += 1
        return nullcontext(ServedCall(None, f"served{self._serial}-"))

    def _check(self, body: Mapping[str, Any], session: CapturedSession | None, path: str) -> None:
        if path not in self.fields:
            return
        refuse_unsupported(
            body, self.fields[path], has_tool_parser=self.has_tool_parser, in_session=session is not None
        )
        items = body.get("input") if path == RESPONSES_PATH else None
        for number, item in enumerate(items if isinstance(items, list) else ()):
            try:
                self.check_item(item)
            except ValueError as error:
                raise RefusedCall(f"`input[{number}]` has no form of an item", param="input") from error
            if isinstance(item, dict) and item.get("role") == "assistant" and item.get("content") == []:
                raise RefusedCall(f"`input[{number}].content` is empty", param="input")  # vLLM reads its first part
        if session is None and body.get("model") != self.name:
            message = f"there is no model {body.get('model')}: this server has {self.name}"
            raise RefusedCall(message, param="model", code="model_not_found", status=404)


def _header_key(scope: Scope) -> str:
    headers: dict[bytes, str] = {name: value.decode("latin-1") for name, value in scope["headers"]}
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")


class _Answer:
    """The way back to the client: remembers whether the answer has begun, and formats errors for the protocol."""

    def __init__(self, send: Send, path: str) -> None:
        self.has_begun = False
        self._send = send
        self._path = path
        self._error: int | None = None  # the status of an error whose body comes now
        self._body = bytearray()

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._error = message["status"]
        elif self._error is None:
            self.has_begun = True
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                self.has_begun = True
                refused = _refusal(bytes(self._body), self._error)  # after a failure the server closes the connection
                await _send_error(refused, self._path, self._send, closes=self._error >= 500)


def _refusal(body: bytes, status: int) -> RefusedCall:
    """Return the error of vLLM's application, with the same message and field."""
    try:
        told = json.loads(body)["error"]
        return RefusedCall(told["message"], param=told.get("param"), status=status)
    except (ValueError, KeyError, TypeError):
        return RefusedCall(body.decode(errors="replace"), status=status)


async def _read(receive: Receive, request: OpenRequest | None) -> bytes:
    """Return the body of a request. RefusedCall: the body is too long, or arrives too late."""
    body = bytearray()
    limit = MAX_REQUEST_BYTES if request is None else request.session.limits.max_request_bytes
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedCall("the client left before its body was complete")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise RefusedCall(f"the body has more than {limit} bytes", status=413)
                if request is not None:
                    request.hold(len(body))
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as error:
        raise RefusedCall(f"the body did not arrive within {BODY_S:g} s", status=408) from error


def _parsed(body: bytes, limits: SessionLimits | None) -> dict[str, Any]:
    """Return the body of a request. RefusedCall: the body is no object of JSON, or has too many parts for a session."""
    if limits is not None and sum(map(body.count, (b",", b"{", b"["))) > limits.max_request_parts:
        message = f"the body has more than {limits.max_request_parts} commas and opening brackets"
        raise RefusedCall(message, status=413)
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedCall(f"the body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RefusedCall("the body is not a JSON object")
    if limits is not None:
        _refuse_costly(parsed, limits.max_requests)
    return parsed


def _refuse_costly(asked: Mapping[str, Any], most: int) -> None:
    """Raise RefusedCall if a list is too long or objects are nested too deep for a quick check of the body.

    A prompt of tokens is a list too, with the session's limit of tokens.
    """
    level = [value for name, value in asked.items() if name != "prompt" and isinstance(value, dict | list)]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RefusedCall(f"the body has objects in objects, more than {MAX_DEPTH} deep", status=413)
        if any(isinstance(one, list) and len(one) > most for one in level):
            raise RefusedCall(f"a list of the body has more than {most} items", status=413)
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]


def _num_responses(body: Mapping[str, Any]) -> int:
    """Return the number of responses asked for by a request. A number refused by vLLM counts as 1.

    RefusedCall: the number is too large, or `n` is no integer. vLLM might accept such an `n`, for example the text "2".
    """
    n, prompt = body.get("n"), body.get("prompt")
    if n is not None and type(n) is not int:
        raise RefusedCall(f"`n` is {n!r:.60}, expected a whole number", param="n")
    prompts = prompt if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt) else [prompt]
    number = max(1, n or 1) * len(prompts)
    if number > MAX_RESPONSES:
        raise RefusedCall(f"the request asks for {number} responses, more than {MAX_RESPONSES}", param="n")
    return number


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body once, and then the next message: the client has gone."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> MutableMapping[str, Any]:
        return unread.pop() if unread else await receive()

    return read


async def _send_error(error: RefusedCall, path: str, send: Send, *, closes: bool) -> None:
    """Send an error, and close the connection if `closes`."""
    body = json.dumps(error.body(path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if closes else []
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
