"""`rlhf serve` in front of engines that stand in for real ones: forms, refusals, the token, the deadline, deaths."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from aiohttp import ClientError
from aiohttp.test_utils import TestClient, TestServer
from ray.exceptions import ActorDiedError, RayError
from tokenizers import AddedToken

import rlhf
from actors.rollout.engine_actor import EngineHealth
from actors.serving.http import MAX_BODY_BYTES, ModelServer, ServerSpec
from actors.serving.openai_schema import MOST_SAMPLES, ChatRequest, read
from actors.serving.router import NoEngine, RequestRouter
from rlhf.cli import main
from rlhf.data.tokenization import encode_raw
from rlhf.errors import RunError
from rlhf.models.tiny import byte_tokenizer
from rlhf.rollouts.records.spans import Sampled
from rlhf.types import Prompt, RolloutInfo, Rollouts, Sampling

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "ab"}


def sampled(text: str, reason: Literal["stop", "length"] = "stop", *, end: int = EOS) -> Sampled:
    ids = [*TOKENIZER(text).input_ids, *([end] if reason == "stop" else [])]
    return Sampled(
        token_ids=tuple(ids),
        logprobs=tuple(-0.5 - place for place in range(len(ids))),
        versions=(0,) * len(ids),
        finish_reason=reason,
    )


@dataclass
class StandIn:
    """Engines that say `text` and remember what they were asked."""

    text: str = "yes"
    reason: Literal["stop", "length"] = "stop"
    failure: RunError | None = None
    dead: str | None = None
    end: int = EOS  # the token that it stops with
    hold: asyncio.Event | None = None  # until which nothing is answered
    asked: list[tuple[Prompt, tuple[int, ...], Sampling]] = field(default_factory=list)
    dropped: int = 0

    async def answer(self, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        self.asked.append((prompt, tuple(seeds), sampling))
        if self.failure is not None:
            raise self.failure
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        return [sampled(self.text, self.reason, end=self.end) for _ in seeds]

    async def trouble(self) -> str | None:
        return self.dead


@asynccontextmanager
async def serving(
    engines: StandIn, *, token: str | None = None, max_length: int = 32, deadline_s: float = 20.0, tokenizer: Any = None
) -> AsyncIterator[TestClient[Any, Any]]:
    spec = ServerSpec(name="tiny", max_length=max_length, deadline_s=deadline_s, token=token)
    app = ModelServer(engines, tokenizer or TOKENIZER, spec).application()
    async with TestClient(TestServer(app, handler_cancellation=True)) as client:
        yield client


async def ask(client: TestClient[Any, Any], path: str, body: Any) -> tuple[int, Any]:
    answer = await client.post(f"/v1/{path}", json=body)
    return answer.status, await answer.json()


async def test_a_conversation() -> None:
    engines = StandIn("yes")
    async with serving(engines) as client:
        body = CHAT | {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "stop_token_ids": [3, 4],
            "n": 2,
            "seed": 3,
            "stop": ["Q", "Z"],
            "logprobs": True,
            "structured_outputs": {"choice": ["yes", "no"]},
            "stream": False,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "response_format": {"type": "text"},
            "tools": None,
        }
        status, told = await ask(client, "chat/completions", body)
    assert status == 200, told
    assert told["object"] == "chat.completion"
    assert told["id"].startswith("chatcmpl-")
    assert told["model"] == "tiny"
    one = {"token": "y", "logprob": -0.5, "bytes": [121], "top_logprobs": []}
    for index, choice in enumerate(told["choices"]):
        assert (choice["index"], choice["finish_reason"]) == (index, "stop")
        assert choice["message"] == {"role": "assistant", "content": "yes", "refusal": None}
        assert choice["logprobs"]["content"][0] == one
        assert [token["token"] for token in choice["logprobs"]["content"]] == ["y", "e", "s"]  # not the end of sequence
    (prompt, seeds, sampling) = engines.asked[0]
    assert prompt.text == "<|system|>S<|eos|><|user|>a\nb<|eos|><|assistant|>"
    length = len(prompt.token_ids)
    assert told["usage"] == {"prompt_tokens": length, "completion_tokens": 8, "total_tokens": length + 8}
    assert len(set(seeds)) == 2
    assert sampling == Sampling(
        max_new_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=("Q", "Z"),
        stop_token_ids=(3, 4),
        choices=("yes", "no"),
    )


async def test_what_is_not_given() -> None:
    """No limit is what room there is, seeds are other ones each time, and a seed gives the same ones again."""
    engines = StandIn(reason="length")
    async with serving(engines, max_length=32) as client:
        for _ in range(2):
            status, told = await ask(client, "chat/completions", CHAT)
        assert status == 200
        assert told["choices"][0]["finish_reason"] == "length"
        assert told["choices"][0]["logprobs"] is None
        for _ in range(2):
            await ask(client, "chat/completions", CHAT | {"seed": 5, "max_completion_tokens": 4, "max_tokens": 4})
    (prompt, first, sampling), (_, second, _), (_, third, limited), (_, fourth, _) = engines.asked
    assert sampling == Sampling(max_new_tokens=32 - len(prompt.token_ids))
    assert limited.max_new_tokens == 4
    assert first != second
    assert third == fourth


async def test_prompts_as_they_stand() -> None:
    engines = StandIn("one\ntwo")
    async with serving(engines) as client:
        body = TEXT | {"prompt": ["ab", "cde"], "n": 2, "stop": "\n", "logprobs": 0, "echo": False}
        status, told = await ask(client, "completions", body)
        assert (await ask(client, "completions", TEXT))[1]["choices"][0]["logprobs"] is None
    assert status == 200, told
    assert told["object"] == "text_completion"
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in told["choices"]} == {"one"}  # without what stopped it
    assert told["choices"][0]["logprobs"] == {
        "tokens": ["o", "n", "e"],
        "token_logprobs": [-0.5, -1.5, -2.5],
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
    }
    assert told["usage"] == {"prompt_tokens": 5, "completion_tokens": 32, "total_tokens": 37}
    assert {prompt.text for prompt, _, _ in engines.asked} == {"ab", "cde"}
    assert len({seed for _, seeds, _ in engines.asked[:2] for seed in seeds}) == 4
    assert engines.asked[0][2].max_new_tokens == 16  # OpenAI's


async def test_a_chat_ends_where_its_template_ends_a_turn_and_a_raw_prompt_does_not() -> None:
    chatml = byte_tokenizer()
    chatml.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])  # no special token, as some have it
    chatml.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}assistant:"
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    engines = StandIn("yes", end=end)
    async with serving(engines, tokenizer=chatml, max_length=100) as client:
        _, chat = await ask(client, "chat/completions", CHAT | {"logprobs": True})
        await ask(client, "completions", TEXT)
    assert [prompt.turn_end for prompt, _, _ in engines.asked] == [end, None]
    (choice,) = chat["choices"]
    assert choice["message"]["content"] == "yes"
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["y", "e", "s"]
    assert chat["usage"]["completion_tokens"] == 4


async def test_what_stops_a_response_may_hold_special_tokens() -> None:
    async with serving(StandIn("one<|user|>two")) as client:
        _, told = await ask(client, "chat/completions", CHAT | {"stop": ["<|user|>t"]})
    assert told["choices"][0]["message"]["content"] == "one"


@pytest.mark.parametrize(
    ("change", "param", "why"),
    [
        ({"tools": []}, "tools", "is not supported here; there are model, n,"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "is not supported here"),
        ({"user": "me"}, "user", "is not supported here"),
        ({"stream": True}, "stream", "`stream` is true, but this server supports false only"),
        ({"stream_options": {}}, "stream_options", "is not supported here"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs", "is 2, but this server supports 0 only"),
        ({"presence_penalty": 0.5}, "presence_penalty", "is 0.5, but this server supports 0 only"),
        ({"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"} only'),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.choice", "is missing"),
        ({"structured_outputs": {"choice": ["a"], "json": {}}}, "structured_outputs.json", "is not supported here"),
        ({"structured_outputs": {"choice": ["a\nb"]}}, "structured_outputs.choice", "of printable characters"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "is not a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name", "is not supported here"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "images are not supported",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "end with the assistant's turn"),
        ({"temperature": 0.001}, "temperature", "expected 0 (greedy), or 0.01 to 2"),
        ({"temperature": 10}, "temperature", "expected 0 (greedy), or 0.01 to 2"),
        ({"temperature": float("nan")}, "temperature", "expected 0 (greedy), or 0.01 to 2"),
        ({"temperature": True}, "temperature", "is not a number"),
        ({"temperature": 0, "n": 2}, "temperature", "greedy responses to one prompt are all equal"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": MOST_SAMPLES + 1}, "n", "less than or equal to 128"),
        ({"n": "2"}, "n", "is not an integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "is 4, but max_tokens is 3"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": [""]}, "stop", "has an empty string"),
        ({"logprobs": 1}, "logprobs", "is neither true nor false"),
        ({"model": None}, "model", "is missing"),
    ],
)
async def test_what_is_not_done_is_refused(change: dict[str, Any], param: str, why: str) -> None:
    engines = StandIn()
    async with serving(engines) as client:
        status, told = await ask(client, "chat/completions", CHAT | change)
    assert status == 400, told
    assert told["error"].keys() == {"message", "type", "param", "code"}
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["param"] == param, told
    assert why in told["error"]["message"]
    assert not engines.asked


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stop": ["a"] * 65}, "`stop` is "),
        ({"stop_token_ids": [-1]}, "`stop_token_ids[0]` is -1"),
        ({"min_p": 2.0}, "`min_p` is 2.0"),
        ({"echo": True}, "`echo` is true, but this server supports false only"),
        ({"best_of": 3}, "`best_of` is 3, but this server supports 1 only"),
        ({"logprobs": 5}, "`logprobs` is 5"),
        ({"prompt": [1, 2]}, "`prompt[0]` is not a string"),
        ({"prompt": ""}, "has no tokens"),
        ({"prompt": "\ud800"}, "half of a character"),
        ({"messages": []}, "`messages` is not supported here"),
    ],
)
async def test_what_is_not_done_for_prompts(change: dict[str, Any], why: str) -> None:
    async with serving(StandIn()) as client:
        status, told = await ask(client, "completions", TEXT | change)
    assert status == 400, told
    assert why in told["error"]["message"]


def test_every_field_of_openais_client_is_done_or_refused() -> None:
    """Whatever the client can send besides what is done here: a value of it is refused, not passed over."""
    create = pytest.importorskip("openai.types.chat.completion_create_params")
    fields = create.CompletionCreateParamsBase.__annotations__
    for name in fields.keys() - ChatRequest.model_fields.keys():
        with pytest.raises(Exception, match=f"`{name}`"):
            read(f'{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], "{name}": "x"}}', ChatRequest)


async def test_other_models_lengths_and_bodies() -> None:
    engines = StandIn()
    async with serving(engines, max_length=32) as client:
        status, told = await ask(client, "chat/completions", CHAT | {"model": "other"})
        assert (status, told["error"]["code"]) == (404, "model_not_found")
        for limit in (100, 29):
            status, told = await ask(client, "chat/completions", CHAT | {"max_tokens": limit})
            assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
            assert f"has 5 tokens, with {limit} new ones that is more than the 32" in told["error"]["message"]
        long = [{"role": "user", "content": "x" * 40}]
        assert (await ask(client, "chat/completions", CHAT | {"messages": long}))[0] == 400
        for body, why in ((b"{", "is not JSON"), (b"[]", "not a JSON object"), (b"\xff", "is not text")):
            answer = await client.post("/v1/chat/completions", data=body)
            assert answer.status == 400
            assert why in (await answer.json())["error"]["message"]
        big = await client.post("/v1/chat/completions", data=b" " * (MAX_BODY_BYTES + 1))
        assert (big.status, (await big.json())["error"]["param"]) == (413, None)
        for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404)):
            answer = await client.request(method, path)
            assert answer.status == status
            assert "POST /v1/chat/completions" in (await answer.json())["error"]["message"]
    assert not engines.asked


async def test_a_prompt_of_too_many_characters_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(map(len, TOKENIZER.get_vocab()))
    text = "x" * (32 * longest + 1)

    def unasked(*arguments: object) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr("actors.serving.http.encode", unasked)
    monkeypatch.setattr("actors.serving.http.encode_raw", unasked)
    async with serving(StandIn(), max_length=32) as client:
        for path, body in (
            ("completions", TEXT | {"prompt": text}),
            ("chat/completions", CHAT | {"messages": [{"role": "user", "content": text}]}),
        ):
            status, told = await ask(client, path, body)
            assert (status, told["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_long_prompt_does_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.serving.http.LONG_TEXT", 8)
    tokenizing = threading.Event()

    def slow_where_long(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        if len(texts[0]) > 8:
            assert tokenizing.wait(20.0)
        return encode_raw(texts, tokenizer)

    monkeypatch.setattr("actors.serving.http.encode_raw", slow_where_long)
    async with serving(StandIn("yes"), max_length=32) as client:
        long = asyncio.ensure_future(ask(client, "completions", TEXT | {"prompt": "long enough", "max_tokens": 1}))
        assert (await ask(client, "completions", TEXT | {"prompt": "a"}))[0] == 200
        assert not long.done()
        tokenizing.set()
        assert (await long)[0] == 200


async def test_a_model_without_a_chat_template_takes_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    async with serving(StandIn(), tokenizer=tokenizer) as client:
        status, told = await ask(client, "chat/completions", CHAT)
        assert status == 400
        assert "tiny has no chat template" in told["error"]["message"]
        assert (await ask(client, "completions", TEXT))[0] == 200


async def test_models_and_the_token() -> None:
    async with serving(StandIn(), token="s3cret-token") as client:
        assert (await client.get("/health")).status == 200
        for answer in (await client.get("/v1/models"), await client.post("/v1/chat/completions", json=CHAT)):
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == "invalid_api_key"
        client.session.headers["Authorization"] = "Bearer s3cret-token"
        (model,) = (await (await client.get("/v1/models")).json())["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 32)
        assert (await ask(client, "chat/completions", CHAT))[0] == 200
    async with serving(StandIn()) as client:
        assert (await client.get("/v1/models", headers={"Host": "elsewhere.org"})).status == 403
        assert (await client.get("/v1/models")).status == 200


async def test_a_request_ends_at_its_deadline_and_with_its_caller() -> None:
    engines = StandIn(hold=asyncio.Event())
    async with serving(engines, deadline_s=0.2) as client:
        status, told = await ask(client, "chat/completions", CHAT)
        assert status == 504
        assert "not answered within 0.2 s (--deadline-s)" in told["error"]["message"]
        assert (await ask(client, "completions", TEXT | {"prompt": ["a", "b"]}))[0] == 504
        assert engines.dropped == 3
    engines = StandIn(hold=asyncio.Event())
    async with serving(engines) as client:
        with pytest.raises((ClientError, TimeoutError)):
            async with asyncio.timeout(0.3):
                await client.post("/v1/chat/completions", json=CHAT)
        await until(lambda: engines.dropped == 1)


async def test_what_is_being_answered_when_it_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.serving.http.LAST_S", 0.3)
    engines = StandIn(hold=asyncio.Event())
    spec = ServerSpec(name="tiny", max_length=32, deadline_s=20.0, token=None)
    server = TestServer(ModelServer(engines, TOKENIZER, spec).application(), handler_cancellation=True)
    async with TestClient(server) as client:
        waiting = asyncio.create_task(ask(client, "chat/completions", CHAT))
        await until(lambda: len(engines.asked) == 1)
        ending = asyncio.create_task(server.close())
        status, told = await waiting
        assert (status, told["error"]["message"]) == (503, "the server was told to end")
        assert engines.dropped == 1
        await ending


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not holds():
            await asyncio.sleep(0.01)


async def test_many_are_answered_at_once_and_too_many_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.serving.http.MAX_WAITING", 3)
    engines = StandIn(hold=asyncio.Event())
    async with serving(engines) as client:
        waiting = [asyncio.create_task(ask(client, "chat/completions", CHAT)) for _ in range(3)]
        await until(lambda: len(engines.asked) == 3)
        status, told = await ask(client, "chat/completions", CHAT)
        assert (status, told["error"]["type"]) == (429, "rate_limit_error")
        assert engines.hold is not None
        engines.hold.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3
        assert (await ask(client, "chat/completions", CHAT))[0] == 200


async def test_failures_of_engines() -> None:
    async with serving(StandIn(failure=NoEngine("engine 0 died of x"), dead="engine 0 died of x")) as client:
        for status, told in (
            await ask(client, "chat/completions", CHAT),
            await ask(client, "completions", TEXT),
            ((answer := await client.get("/health")).status, await answer.json()),
        ):
            assert status == 503
            assert told["error"] == {
                "message": "engine 0 died of x",
                "type": "server_error",
                "param": None,
                "code": None,
            }
    async with serving(StandIn(failure=RunError("it choked"))) as client:
        status, told = await ask(client, "chat/completions", CHAT)
        assert (status, told["error"]["message"]) == (500, "it choked")


# Engines behind actors' handles


class Method:
    """A method of an actor: `remote` runs `work` and gives what stands for references."""

    def __init__(self, work: Callable[..., Any], num_returns: int = 1) -> None:
        self.work = work
        self.num_returns = num_returns

    def options(self, *, num_returns: int) -> Method:
        return Method(self.work, num_returns)

    def remote(self, *arguments: Any) -> Any:
        refs = [Ref() for _ in range(self.num_returns)]
        try:
            result = self.work(*arguments)
        except RayError as error:
            for ref in refs:
                ref.held.set_exception(error)
        else:
            if result is not None:  # None: it never comes
                for ref, value in zip(refs, result if self.num_returns > 1 else [result], strict=True):
                    ref.held.set_result(value)
        return refs if self.num_returns > 1 else refs[0]


class Ref:
    def __init__(self) -> None:
        self.held: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.held


@dataclass
class Handle:
    """An engine that echoes its prompt once a seed; `state`: how it fails."""

    state: Literal["well", "dies", "fails", "broken", "hangs"] = "well"
    asked: list[Any] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generate = Method(self._generate)
        self.health = Method(self._health)
        self.cancel = Method(self._cancel)

    def _generate(self, request: Any, sampling: Sampling) -> Any:
        self.asked.append(request)
        if self.state == "hangs":
            return None
        if self.state == "dies":
            raise ActorDiedError()
        if self.state != "well":
            raise RayError("no such thing")
        own, times = list(request.prompt.token_ids), len(request.seeds)
        mask = torch.tensor(([False] * len(own) + [True] * len(own)) * times)
        rollouts = Rollouts(
            sequence_ids=torch.arange(times),
            lengths=torch.tensor([2 * len(own)] * times),
            token_ids=torch.tensor(own * 2 * times),
            response_mask=mask,
            rollout_logprobs=torch.where(mask, -1.0, 0.0),
            versions=torch.where(mask, 0, -1),
        )
        infos = tuple(
            RolloutInfo(
                sequence_id=place,
                num_prompt_tokens=len(own),
                num_response_tokens=len(own),
                finish_reason="length",
                min_version=0,
                max_version=0,
                mean_logprob=-1.0,
            )
            for place in range(times)
        )
        return rollouts, infos

    def _health(self) -> EngineHealth:
        if self.state == "dies":
            raise ActorDiedError()
        failure = "engine died with 1 requests in flight: X. The run can be resumed with --resume auto."
        return EngineHealth(
            version=0,
            requests_in_flight=0,
            last_step_age_s=0.0,
            rss_gib=1.0,
            failure=failure if self.state == "broken" else None,
        )

    def _cancel(self, group_ids: list[int]) -> int:
        self.cancelled += group_ids
        return len(group_ids)


PROMPT = Prompt(prompt_id=0, token_ids=(1, 2), text="", columns={})
HOW = Sampling(max_new_tokens=2)


def answering(*states: Any) -> tuple[RequestRouter, list[Handle]]:
    handles = [Handle(state) for state in states]
    return RequestRouter(handles, deadline_s=5.0), handles  # type: ignore[arg-type]


async def test_an_engine_answers() -> None:
    asked, (handle,) = answering("well")
    first, second = await asked.answer(PROMPT, [5, 6], HOW)
    assert first == second == Sampled(token_ids=(1, 2), logprobs=(-1.0, -1.0), versions=(0, 0), finish_reason="length")
    await asked.answer(PROMPT, [5], HOW)
    assert [request.seeds for request in handle.asked] == [(5, 6), (5,)]
    assert len({request.group_id for request in handle.asked}) == 2
    assert asked.in_flight == [0]
    assert await asked.trouble() is None


async def test_requests_go_to_the_engine_with_the_fewest_and_are_dropped_there() -> None:
    asked, handles = answering("hangs", "hangs")
    tasks = [asyncio.create_task(asked.answer(PROMPT, [1], HOW)) for _ in range(4)]
    await until(lambda: sum(len(handle.asked) for handle in handles) == 4)
    assert asked.in_flight == [2, 2]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert asked.in_flight == [0, 0]
    for handle in handles:
        assert handle.cancelled == [request.group_id for request in handle.asked]


@pytest.mark.parametrize("state", ["dies", "broken"])
async def test_a_dead_engine_is_asked_no_more(state: Any) -> None:
    asked, (dead, alive) = answering(state, "well")
    for _ in range(3):
        assert len(await asked.answer(PROMPT, [1, 2], HOW)) == 2
    assert len(dead.asked) == 1
    assert len(alive.asked) == 3
    assert await asked.trouble() is None
    alone, _ = answering(state)
    for _ in range(2):
        with pytest.raises(NoEngine, match="died") as told:
            await alone.answer(PROMPT, [1], HOW)
        assert "--resume" not in str(told.value)
    assert await alone.trouble() == str(told.value)
    noticed, _ = answering(state)
    assert "died" in (await noticed.trouble() or "")  # by a look alone


async def test_an_engine_that_fails_on_a_request_and_lives_goes_on() -> None:
    asked, (handle,) = answering("fails")
    with pytest.raises(RunError, match="serve: rollout rank 0 failed") as told:
        await asked.answer(PROMPT, [1], HOW)
    assert not isinstance(told.value, NoEngine)
    assert await asked.trouble() is None
    handle.state = "well"
    assert await asked.answer(PROMPT, [1], HOW)


# The command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_says_what_ended_it_and_signals_are_heard_as_before(number: signal.Signals) -> None:
    script = (
        "import signal, sys\n"
        "from aiohttp import web\n"
        "from rlhf.serving import serve_until_interrupted\n"
        "hear = lambda *_: None\n"
        "signal.signal(signal.SIGTERM, hear)\n"
        "say = lambda text: print(text, flush=True)\n"
        "told = serve_until_interrupted(web.Application(), host='127.0.0.1', port=0, ready=say)\n"
        "say((told.name, signal.getsignal(signal.SIGTERM) is hear))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(number)
            assert process.stdout.readline() == f"('{number.name}', True)\n"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["MODEL", "--host", "0.0.0.0"], "Name an environment variable that holds a token: --token-env NAME"),
        (["MODEL", "--token-env", "NO_SUCH_TOKEN"], "the environment variable NO_SUCH_TOKEN is not set"),
        (["MODEL", "--port", "99999"], "--port 99999: the server cannot listen there"),
        (["MODEL", "--engines", "0"], "--engines: is 0, expected 1 or more"),
        (["MODEL", "--kv-cache-gib", "0"], "--kv-cache-gib: is 0, expected 1 or more"),
        (["MODEL", "--kv-cache-gib", "2", "--device", "cuda"], "has no effect on a GPU"),
        (["MODEL", "--tensor-parallel", "2"], "--tensor-parallel: distributes a model over GPUs"),
        (["MODEL", "--max-length", "1"], "--max-length: is 1, expected 2 or more"),
        (["MODEL", "--max-length", "4096"], "--max-length: is 4096, more than the 2048 tokens that"),
        (["MODEL", "--deadline-s", "0"], "--deadline-s: is 0, expected more than 0"),
        (["no/such/folder"], "no/such/folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    words: list[str], why: str, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("it starts engines")

    monkeypatch.setattr("actors.serving.http.serving", started)
    given = [str(tiny_model) if word == "MODEL" else word for word in words]
    with socket.socket() as free:  # not the usual one, which somebody may serve on here
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given += [] if "--port" in given else ["--port", str(port)]
    assert main(["serve", *given]) == 2
    assert why in capsys.readouterr().err


def test_the_command_and_the_call_start_the_same_server(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(model: Any, tokenizer: Any, spec: ServerSpec, cluster: Any, *, host: str, port: int, **_: Any) -> None:
        calls.append((spec, cluster.device, cluster.roles.rollout, cluster.call_timeout_s, host, port))

    monkeypatch.setattr("actors.serving.http.serve_model", record)
    monkeypatch.setattr("rlhf.serving.refuse_taken", lambda host, port: None)
    monkeypatch.setenv("T", "secret")
    assert main(["serve", str(tiny_model), "--port", "0"]) == 0
    rlhf.serve(str(tiny_model))
    words = ["--name", "judge", "--engines", "2", "--kv-cache-gib", "5", "--max-length", "99"]
    assert main(["serve", str(tiny_model), *words, "--token-env", "T", "--host", "::1", "--deadline-s", "3"]) == 0
    assert main(["serve", str(tiny_model), "--tensor-parallel", "4", "--device", "cuda"]) == 0
    assert calls[0] == calls[1]
    spec, device, rollout, timeout_s, host, port = calls[2]
    assert spec == ServerSpec(name="judge", max_length=99, deadline_s=3.0, token="secret")
    assert (device, rollout.engines, rollout.kv_cache_gib, timeout_s) == ("cpu", 2, 5, 63.0)
    assert (host, port) == ("::1", 8702)
    assert (calls[3][1], calls[3][2].tensor_parallel) == ("cuda", 4)


def test_a_model_is_served_until_a_signal(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def started(*_: Any, **__: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(engines=SimpleNamespace(handles=[]))

    names: list[str] = []

    def ask(url: str) -> None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
                names.extend(model["id"] for model in json.load(answer)["data"])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("actors.serving.http.serving", started)
    rlhf.serve(str(tiny_model), name="tiny", ready=lambda url: threading.Thread(target=ask, args=[url]).start())
    assert names == ["tiny"]
