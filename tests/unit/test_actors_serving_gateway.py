"""The entrance of the front checks keys, paths, bodies and limits, before an application in place of vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from actors.serving import gateway
from actors.serving.captured_sessions import CURRENT_CALL, MAX_OPEN_REQUESTS, CapturedSessions, ServedCall
from actors.serving.gateway import Gateway
from rlhf.agents.limits import SessionLimits
from rlhf.types import Sampling

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
FIELDS = {
    "/v1/chat/completions": {"model", "messages", "n", "tools", "stop"},
    "/v1/messages": {"model", "messages"},
    "/v1/responses": {"model", "input"},
}
LIMIT = SessionLimits(max_calls=3, max_tokens=99, seed=0).max_request_bytes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "REFUSED_AFTER_S", 0.0)


class Application:
    """Answers with path and body, and records the session of each call. `hangs`: before or during the answer.

    `refusal`: the status and the parts of the body in the answer to each request.
    """

    def __init__(self) -> None:
        self.calls: list[ServedCall] = []
        self.hangs = ""
        self.refusal: tuple[int, list[bytes]] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append(CURRENT_CALL.get())
        message = await receive()
        if self.hangs == "before":
            await asyncio.sleep(600)
        told = {"path": scope["path"], "body": message["body"].decode()}
        status, parts = self.refusal or (200, [json.dumps(told).encode()])
        await send({"type": "http.response.start", "status": status, "headers": []})
        if self.hangs == "in":
            await asyncio.sleep(600)
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": part is not parts[-1]})


class Asked:
    """A gateway with an open session of the key `s`."""

    def __init__(self, **limits: Any) -> None:
        self.app, self.sessions = Application(), CapturedSessions(lambda prefix: None)
        values = {"max_calls": 3, "max_tokens": 99, "seed": 0} | limits
        self.session = self.sessions.open("s", Sampling(max_new_tokens=9), SessionLimits(**values))
        self.sent: list[Any] = []  # of the last request
        self.gateway = Gateway(
            app=self.app,
            sessions=self.sessions,
            fields=FIELDS,
            own_key="own",
            name="tiny",
            has_tool_parser=False,
            check_item=lambda item: int(item),
        )

    async def __call__(
        self,
        body: Any = ASK,
        *,
        key: str | None = "s",
        path: str = "/v1/chat/completions",
        method: str = "POST",
        header: bytes = b"authorization",
    ) -> tuple[int, Any]:
        parts = body if isinstance(body, list) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
        messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
        given = [(header, (f"Bearer {key}" if header == b"authorization" else str(key)).encode())] if key else []
        scope = {"type": "http", "method": method, "path": path, "headers": given}
        self.sent = sent = []

        async def receive() -> Any:
            return messages.pop(0) if messages else await asyncio.sleep(600)

        async def send(message: Any) -> None:
            sent.append(message)

        await self.gateway(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    async def refused(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        status, told = await self(*arguments, **options)
        return status, told["error"]["message"]


async def test_a_session_is_known_by_either_header_and_by_the_path_while_it_is_open() -> None:
    ask = Asked()
    told = (200, {"path": "/v1/chat/completions", "body": json.dumps(ASK)})
    assert await ask() == told
    assert await ask(header=b"x-api-key") == told
    assert await ask(key="unused", path="/s/s/v1/chat/completions") == told
    assert [call.session for call in ask.app.calls] == [ask.session] * 3
    assert len({call.name for call in ask.app.calls}) == 3
    for key in (None, "", "other", "S"):
        for path in ("/v1/chat/completions", "/s/other/v1/chat/completions"):
            assert await ask.refused(key=key, path=path) == (401, "no open session has this key")
    ask.sessions.close("s")
    assert (await ask.refused())[0] == 401
    assert len(ask.app.calls) == 3


async def test_the_servers_own_key_is_not_captured_and_has_one_model() -> None:
    ask = Asked()
    assert (await ask(key="own"))[0] == 200
    assert ask.app.calls[0].session is None
    assert await ask.refused(ASK | {"model": "m"}, key="own") == (404, "there is no model m: this server has tiny")
    assert (await ask(ASK | {"model": "m"}))[0] == 200  # a session may use any name for the model


async def test_bodies() -> None:
    ask = Asked()
    assert (await ask([b'{"model": "tiny",', b' "messages": []}']))[0] == 200
    assert await ask.refused(b"x" * (LIMIT + 1)) == (413, f"the body has more than {LIMIT} bytes")
    assert await ask.refused([b"x" * LIMIT, b"y"]) == (413, f"the body has more than {LIMIT} bytes")
    assert await ask.refused(b"[]") == (400, "the body is not a JSON object")
    for body in (b"{", b"", b"\xff", b"[" * 190):
        status, why = await ask.refused(body)
        assert (status, "is not JSON" in why) == (400, True)


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"use_beam_search": True}, 400, "`use_beam_search` is not supported here: beam search does not sample"),
        ({"kv_transfer_params": {"a": 1}}, 400, "the server makes the prompt's tokens itself"),
        ({"anything": 1}, 400, "`anything` is not supported here; there are messages, model, n, stop, tools"),
        ({"tools": [{"type": "web_search"}]}, 400, "`tools[0].type` is 'web_search': the server runs no tools"),
        ({"tools": [{"type": "function"}]}, 400, "or with a tool parser (--tool-parser)"),
        ({"previous_response_id": "r"}, 404, "send the whole conversation in `input`"),
        ({"n": 129}, 400, "asks for 129 responses, more than 128"),
        ({"n": "2"}, 400, "`n` is '2', expected a whole number"),  # vLLM would read the string as 2
        ({"n": 2.0}, 400, "`n` is 2.0, expected a whole number"),
        ({"messages": [{}] * 1031}, 413, "a list of the body has more than 1030 items"),
        ({"tools": [{"a": [{}] * 1031}]}, 413, "a list of the body has more than 1030 items"),
        ({"stop": ["", ""] * 2550}, 413, "the body has more than 5099 commas and opening brackets"),
        ({"tools": json.loads("[" * 62 + "]" * 62)}, 413, "the body has objects in objects, more than 60 deep"),
    ],
)
async def test_what_is_not_supported_or_takes_long_to_read_is_refused(
    change: dict[str, Any], status: int, why: str
) -> None:
    ask = Asked()
    told = await ask.refused(ASK | change)
    assert (told[0], why in told[1], ask.app.calls) == (status, True, []), told
    nothing = {"use_beam_search": False, "anything": None, "user": "me", "store": True, "kv_transfer_params": {}}
    assert (await ask(ASK | nothing | {"stop": ["x"] * 1000}))[0] == 200


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/v1/embeddings", 404), ("GET", "/v1/messages", 405)])
async def test_other_paths_name_those_that_there_are(method: str, path: str, status: int) -> None:
    found, told = await Asked()(method=method, path=path)
    assert (found, told.get("type") == "error") == (status, path == "/v1/messages")
    assert "POST /v1/chat/completions" in told["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/v1/chat/completions", 400, "invalid_request_error"),
        ("/v1/chat/completions", 500, "server_error"),
        ("/v1/messages", 400, "invalid_request_error"),
        ("/v1/messages", 413, "request_too_large"),
        ("/v1/messages", 500, "api_error"),
    ],
)
async def test_errors_of_vllm_have_the_form_of_the_protocol(path: str, status: int, kind: str) -> None:
    ask = Asked()
    told = json.dumps({"error": {"message": "no", "type": "BadRequestError", "param": "stop", "code": status}}).encode()
    ask.app.refusal = status, [told[:9], told[9:]]
    is_anthropic = path == "/v1/messages"
    error: dict[str, Any] = {"message": "no", "type": kind}
    expected = {"type": "error", "error": error} if is_anthropic else {"error": error | {"param": "stop", "code": None}}
    assert await ask(path=path) == (status, expected)
    assert ((b"connection", b"close") in ask.sent[0]["headers"]) == (status == 500)
    ask.app.refusal = status, [b"Internal Server Error"]
    assert await ask.refused(path=path) == (status, "Internal Server Error")


async def test_the_first_wrong_item_of_an_input_is_named() -> None:
    ask = Asked()
    wrong = {"model": "m", "input": [1, "x", "y"]}
    assert await ask.refused(wrong, path="/v1/responses") == (400, "`input[1]` has no form of an item")
    assert (await ask({"model": "m", "input": [1]}, path="/v1/responses"))[0] == 200


async def test_the_open_requests_of_a_session_are_bounded() -> None:
    ask = Asked()
    ask.app.hangs = "before"
    half = json.dumps(ASK).encode().ljust(LIMIT // 2)
    held = [asyncio.create_task(ask(half)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert await ask.refused(half) == (429, f"the open requests of the session have more than {LIMIT} bytes")
    held += [asyncio.create_task(ask(b"{")) for _ in range(MAX_OPEN_REQUESTS)]
    ask.sessions.close("s")
    assert {status for status, _ in await asyncio.gather(*held)} <= {401, 400, 429}
    assert not ask.session.requests


@pytest.mark.parametrize(("hangs", "bodies"), [("before", 1), ("in", 0)])
async def test_an_open_request_ends_with_its_session(hangs: str, bodies: int) -> None:
    ask = Asked()
    ask.app.hangs = hangs
    request = asyncio.create_task(ask())
    await asyncio.sleep(0.05)
    ask.sessions.close("s")
    await asyncio.gather(request, return_exceptions=True)
    start, *rest = ask.sent
    assert (start["status"], len(rest)) == (401 if bodies else 200, bodies)  # without a body, the connection is closed


async def test_a_flood_of_requests_is_refused_slowly_and_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Asked()
    many = ask.session.limits.max_requests
    assert await statuses(ask, [b"{"] * (many + 1)) == [400] * many + [429]
    assert (ask.session.exceeded, ask.session.is_over.is_set()) == ("max_calls", True)
    monkeypatch.setattr(gateway, "REFUSED_AFTER_S", 600.0)
    held = [asyncio.create_task(ask(key="guessed")) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(request.done() for request in held)
    monkeypatch.setattr(gateway, "MAX_HELD", 2)
    assert (await ask(key="guessed"))[0] == 401
    assert (await ask.refused(b"{", key="own"))[0] == 400  # this request is not held back
    for request in held:
        request.cancel()


async def statuses(ask: Asked, bodies: Sequence[Any]) -> list[int]:
    return [(await ask(body))[0] for body in bodies]


async def test_each_response_counts_as_a_call() -> None:
    assert await statuses(ask := Asked(), [ASK, ASK, ASK, ASK]) == [200, 200, 200, 429]
    assert ask.session.exceeded == "max_calls"
    assert await statuses(ask := Asked(), [ASK | {"n": 2}, ASK | {"n": 2}]) == [200, 429]
    assert ask.session.exceeded == "max_calls"
    assert await statuses(Asked(concurrent_calls=1), [ASK | {"n": 2}, ASK]) == [400, 200]
    ask = Asked()
    for _ in range(9):
        assert (await ask(method="GET", path="/v1/models"))[0] == 200  # no call of the model
    assert ask.session.exceeded is None
