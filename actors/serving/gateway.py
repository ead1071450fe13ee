"""The entrance of the front: whose call a request is, what it may ask for, and how long it may be.

It is an ASGI application around vLLM's. The key of a session comes as the API key of OpenAI's or Anthropic's clients,
or in the path of the base URL: /s/KEY/v1/...
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from actors.serving.refusals import DRAWING, RefusedCall, refuse_route, refuse_unsupported
from actors.serving.sessions import CURRENT_CALL, OpenSession, ServedCall, Sessions
from rlhf.agents.limits import MAX_REQUEST_BYTES
from rlhf.serving import BODY_S, is_same_secret

MAX_RESPONSES = 128  # of one request
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gateway:
    """Lets calls of open sessions through, and calls with the server's own key, which are not captured.

    Args:
        app: vLLM's ASGI application.
        fields: the fields of vLLM's requests, by path.
        own_key: the key of calls that are answered as the client asks. None: there are none.
        name: the only model of these calls. Sessions may name a model as they like.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        sessions: Sessions,
        fields: Mapping[str, Collection[str]],
        *,
        own_key: str | None,
        name: str,
        has_tool_parser: bool,
    ) -> None:
        self.app = app
        self.sessions = sessions
        self.fields = fields
        self.own_key = own_key
        self.name = name
        self.has_tool_parser = has_tool_parser
        self._serial = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope["path"]
        try:
            key = _header_key(scope)
            if path.startswith("/s/"):
                key, _, rest = path[len("/s/") :].partition("/")
                path = f"/{rest}"
            session = self._session(key)
            refuse_route(scope["method"], path)
            limit = MAX_REQUEST_BYTES if session is None else session.limits.max_request_bytes
            body = await _read(receive, limit) if scope["method"] == "POST" else b""
            asked = _parsed(body) if scope["method"] == "POST" else {}
            self._check(asked, session, path)
            with self._call(asked, session, path) as call:
                CURRENT_CALL.set(call)
                await self.app({**scope, "path": path, "raw_path": path.encode()}, _replay(body, receive), send)
        except RefusedCall as error:
            await _send_error(error, path, send)

    def _session(self, key: str) -> OpenSession | None:
        """Return the session of a key, or None for the server's own key."""
        if self.own_key is not None and is_same_secret(key, self.own_key):
            return None
        session = self.sessions.find(key)
        if session is None:
            raise RefusedCall("no open session has this key", code="invalid_api_key", status=401)
        return session

    def _call(
        self, asked: Mapping[str, Any], session: OpenSession | None, path: str
    ) -> AbstractContextManager[ServedCall]:
        num_responses = _num_responses(asked)
        if num_responses > MAX_RESPONSES:
            why = f"the request asks for {num_responses} responses, more than {MAX_RESPONSES}"
            raise RefusedCall(why, param="n")
        if session is not None and path in DRAWING:
            return session.call(num_responses)
        self._serial += 1
        return nullcontext(ServedCall(None, f"served{self._serial}-"))

    def _check(self, body: Mapping[str, Any], session: OpenSession | None, path: str) -> None:
        if path not in self.fields:
            return
        refuse_unsupported(body, self.fields[path], has_tool_parser=self.has_tool_parser)
        if session is None and body.get("model") != self.name:
            message = f"there is no model {body.get('model')}: this server has {self.name}"
            raise RefusedCall(message, param="model", code="model_not_found", status=404)


def _header_key(scope: Scope) -> str:
    """Return the API key in the headers of a request, or an empty string."""
    headers: dict[bytes, str] = {name: value.decode("latin-1") for name, value in scope["headers"]}
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")


async def _read(receive: Receive, limit: int) -> bytes:
    """Return the body of a request. RefusedCall: it is too long, or does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedCall("the client left before its body was complete")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise RefusedCall(f"the body has more than {limit} bytes", status=413)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as error:
        raise RefusedCall(f"the body did not arrive within {BODY_S:g} s", status=408) from error


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedCall(f"the body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RefusedCall("the body is not a JSON object")
    return parsed


def _num_responses(body: Mapping[str, Any]) -> int:
    """Return how many responses a request asks for. A value that vLLM will refuse counts as 1."""
    n, prompt = body.get("n"), body.get("prompt")
    num_prompts = 1
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        num_prompts = len(prompt)
    return (n if isinstance(n, int) and n > 0 else 1) * num_prompts


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body once, and then what comes after it: that the client has gone."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> MutableMapping[str, Any]:
        return unread.pop() if unread else await receive()

    return read


async def _send_error(error: RefusedCall, path: str, send: Send) -> None:
    body = json.dumps(error.body(path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
