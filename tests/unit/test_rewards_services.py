"""Rewards from services of this process: retries, the breaker, limits, tokens, checked answers, a judge's questions."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from rlhf.config.schema.rewards import JudgeConfig
from rlhf.errors import RunError
from rlhf.rewards.processes.pool import GroupOutcome
from rlhf.rewards.scoring import RewardSet, RewardSpec, ask_deadline_s, asks_in_flight, fingerprint
from rlhf.rewards.services import client as service_module
from rlhf.rewards.services import remote as remote_module
from rlhf.rewards.services.client import TRIPS_AFTER, Breaker, ServiceSpec
from rlhf.rewards.services.judge import JudgeSpec, question, verdict
from rlhf.rewards.services.remote import RemoteReward, RemoteRewards, read_scores
from rlhf.types import Prompt
from tests.fakes.services import FakeService, served

PROMPT = Prompt(prompt_id=7, token_ids=(1,), text="p", columns={"answer": "ab", "kind": "maths"})
SCORE_10 = {"choices": [{"message": {"content": "Score: 10"}}]}


def judge_of(**settings: Any) -> JudgeSpec:
    return JudgeSpec(**dict(JudgeConfig(model="m", **settings)))


def spec(url: str, *, judge: JudgeSpec | None = None, **given: Any) -> RewardSpec:
    limits: dict[str, Any] = {"timeout_s": 1.0, "deadline_s": 5.0, "max_in_flight": 4} | given
    remote = RemoteReward(service=ServiceSpec(url=url, **limits), judge=judge)
    return RewardSpec(name="style", weight=2.0, function=None, remote=remote)


def ask(one: RewardSpec, responses: list[str]) -> GroupOutcome:
    with closing(RewardSet([one], timeout_s=1.0)) as rewards:
        return rewards.ask(PROMPT, responses, truncated=[False] * len(responses))["style"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FIRST_PAUSE_S", 0.01)


def test_a_group_is_one_request_with_its_row_and_its_token() -> None:
    service = FakeService({"scores": [0.5, 2]})
    with served(service) as url, closing(RewardSet([spec(url, token="s3cret")], timeout_s=1.0)) as rewards:
        asked = rewards.ask(PROMPT, ["a", "b"], truncated=[False, True])
        scores = rewards.score(PROMPT, ["a", "b"], truncated=[False, True], asked=asked)
    body = {"prompt": "p", "responses": ["a", "b"], "truncated": [False, True], "columns": dict(PROMPT.columns)}
    assert service.requests == [("/v1", "Bearer s3cret", body)]
    assert (scores.scores, scores.by_name) == ((1.0, 4.0), {"style": (0.5, 2.0)})


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_may_pass_is_asked_again(status: int) -> None:
    service = FakeService(status, status, {"scores": [1.0]})
    with served(service) as url:
        assert ask(spec(url), ["a"]).scores == (1.0,)
    assert len(service.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    service = FakeService(status, text="no, Bearer s3cret-token!", headers={"Location": "/elsewhere"})
    with served(service) as url:
        failures = ask(spec(url, token="s3cret-token"), ["a", "b"]).failures
    assert [path for path, _, _ in service.requests] == ["/v1"]
    message = f"HTTP {status}: no, Bearer ***!"
    assert [(f.sample, f.kind, f.message) for f in failures] == [(0, "refused", message), (1, "refused", message)]


def greet(one: RewardSpec) -> None:
    with closing(RewardSet([one], timeout_s=1.0)) as rewards:
        rewards.greet()


def test_a_service_that_is_not_there_or_refuses_the_token_is_an_error_at_the_deadline_and_at_the_start() -> None:
    gone = spec("http://127.0.0.1:9/score", deadline_s=0.5)
    begun = time.monotonic()
    (failure,) = ask(gone, ["a"]).failures
    assert time.monotonic() - begun > 0.4  # the call was repeated until the deadline
    assert failure.kind == "unavailable"
    assert "no answer within 0.5 s" in failure.message
    assert "ClientConnectorError" in failure.message
    with pytest.raises(RunError, match=r"rewards.style: .* be reached"):
        greet(gone)
    service = FakeService(405, 401)
    with served(service) as url:
        greet(spec(url, token="right"))  # 405: the service answers
        with pytest.raises(RunError, match=r"it refused the token with HTTP 401"):
            greet(spec(url, token="wrong"))
    assert [token for _, token, _ in service.requests] == ["Bearer right", "Bearer wrong"]


def test_groups_wait_for_a_service_of_fewer_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(0.4)
        return web.json_response({"scores": [1.0]})

    with served(handler) as url, ThreadPoolExecutor(8) as threads:
        limits = {"timeout_s": 2.0, "deadline_s": 2.0}
        specs = {"wide": spec(url, **limits, max_in_flight=8), "narrow": spec(url, **limits, max_in_flight=1)}
        rewards = RemoteRewards({name: one.remote for name, one in specs.items()})  # type: ignore[misc]
        with monkeypatch.context() as patch:
            patch.setattr(remote_module, "CLOSE_WITHIN_S", 0.1)
            ask_both = partial(rewards.ask, ["wide", "narrow"], PROMPT, ["a"], truncated=[False])
            outcomes = [asking.result(60.0)["narrow"] for asking in [threads.submit(ask_both) for _ in range(8)]]
        rewards.close()
    assert [outcome.scores for outcome in outcomes] == [(1.0,)] * 8


@pytest.mark.parametrize(("status", "kind"), [(502, "unavailable"), (403, "refused")])
def test_a_status_of_a_proxy_is_treated_like_one_of_the_service(
    status: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(status)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("no_proxy", "")
        (failure,) = ask(spec("https://scores.invalid/score", deadline_s=0.5), ["a"]).failures
        proxy.shutdown()
    assert failure.kind == kind
    assert f"HTTP {status} from the proxy" in failure.message
    assert asked[0] == "scores.invalid:443"
    assert (len(asked) > 1) == (kind == "unavailable")


@pytest.mark.parametrize("fault", ["breaks before the answer", "breaks in the middle of it", "hangs"])
def test_a_broken_or_hanging_attempt_is_made_again(fault: str) -> None:
    calls = []

    async def handler(request: web.Request) -> web.StreamResponse:
        calls.append(1)
        if len(calls) > 1:
            return web.json_response({"scores": [1.0]})
        answer = web.StreamResponse(headers={"Content-Length": "100"})
        if fault == "hangs":
            await asyncio.sleep(60)
        if fault == "breaks in the middle of it":
            await answer.prepare(request)
            await answer.write(b'{"scores": [')
        request.transport.abort()
        return answer

    with served(handler) as url:
        assert ask(spec(url, timeout_s=0.3, deadline_s=30.0), ["a"]).scores == (1.0,)
    assert len(calls) == 2


def test_no_more_requests_at_once_than_may_be() -> None:
    now, most, three = 0, 0, asyncio.Barrier(3)

    async def handler(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await three.wait()
        await asyncio.sleep(0.02)  # a fourth request would arrive meanwhile
        now -= 1
        return web.json_response(SCORE_10)

    with served(handler) as url:
        limits = {"timeout_s": 30.0, "deadline_s": 60.0, "max_in_flight": 3}
        assert ask(spec(url, judge=judge_of(), **limits), [str(i) for i in range(12)]).scores == (1.0,) * 12
    assert most == 3


def test_the_breaker_lets_one_through_at_a_time_until_the_service_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most_while_open, attempts = 0, 0, 0
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(delay: float) -> None:
        pauses.append(delay)
        await sleep(0)

    async def one(breaker: Breaker) -> None:
        nonlocal now, attempts, most_while_open
        while True:
            with suppress(service_module._FailedAttempt):
                async with breaker.turn():
                    attempts += 1
                    fails = attempts <= 4
                    now += 1
                    if breaker.is_open:
                        most_while_open = max(most_while_open, now)
                    await sleep(0.001)
                    now -= 1
                    if fails:
                        raise service_module._FailedAttempt("down", is_down=True)
                return

    async def run() -> None:
        breaker = Breaker("it")
        for _ in range(TRIPS_AFTER):
            assert not breaker.is_open
            with suppress(service_module._FailedAttempt):
                async with breaker.turn():
                    raise service_module._FailedAttempt("down", is_down=True)
        assert breaker.is_open
        await asyncio.gather(*(one(breaker) for _ in range(5)))
        assert not breaker.is_open

    monkeypatch.setattr(asyncio, "sleep", pause)
    asyncio.run(run())
    assert most_while_open == 1
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32]  # before four attempts that fail and one that succeeds
    assert attempts == 9  # the other four calls waited for the first


def test_a_judge_is_asked_once_about_equal_responses_of_a_group() -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        assert request.path == "/v1/chat/completions"
        text = (await request.json())["messages"][0]["content"]
        asked.append(text)
        said = "I cannot say" if "bad" in text else "Score: 1" if "no" in text else "Score: 10"
        return web.json_response({"choices": [{"message": {"content": said}}]})

    judge = judge_of(prompt="{response}")
    with served(handler) as url:
        assert ask(spec(url, judge=judge), ["yes", "no", "yes", "yes"]).scores == (1.0, 0.0, 1.0, 1.0)
        assert sorted(asked) == ["no", "yes"]
        failures = ask(spec(url, judge=judge), ["yes", "bad", "no", "bad"]).failures
    assert [(f.sample, f.kind) for f in failures] == [(1, "not_a_number"), (3, "not_a_number")]


def test_services_get_the_results_of_an_agent() -> None:
    service, judge = FakeService({"scores": [1.0] * 3}, SCORE_10), judge_of(prompt="{answer} {result}")
    results = [{"found": 1}, "told", {"found": 1}]
    with served(service) as url:
        for reward in (spec(url), spec(url, judge=judge)):
            with closing(RewardSet([reward], timeout_s=1.0)) as rewards:
                asked = rewards.ask(PROMPT, ["a", "b", "c"], truncated=[False] * 3, results=results)
                assert asked["style"].scores == (1.0,) * 3
    bodies = [body for _, _, body in service.requests]
    assert bodies[0]["results"] == results
    questions = [body["messages"][0]["content"] for body in bodies[1:]]
    assert sorted(questions) == ["ab told", 'ab {"found": 1}']  # a repeated question is sent once


NESTED: list[Any] = []
for _ in range(2000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        ({}, "refused", 'has no list "scores"'),
        ({"scores": [1.0]}, "not_a_number", "1 scores for 2 responses"),
        ({"scores": [1.0, True]}, "not_a_number", "gave True"),
        ({"scores": [1.0, float("nan")]}, "not_a_number", "gave nan"),
        ({"scores": [1.0, 10**400]}, "not_a_number", "gave 1000"),
        ({"scores": [1.0, 10**5000]}, "not_a_number", "gave a int that cannot be shown"),
        ({"scores": [1.0, NESTED]}, "not_a_number", "gave a list that cannot be shown"),
        ({"errors": [NESTED]}, "refused", "a list that cannot be shown"),
        ({"errors": [{"sample": 1, "kind": "timeout", "message": "slow"}]}, "timeout", "slow"),
        ({"errors": [{"sample": 1, "kind": ["?"], "message": "odd"}]}, "raised", "odd"),
        ({"errors": [{"sample": 5, "message": "?"}], "scores": [1.0, 1.0]}, "refused", "an error of unknown form"),
        ({"errors": "all wrong"}, "refused", "all wrong"),
    ],
)
def test_answers_are_checked(answer: dict[str, Any], kind: str, why: str) -> None:
    outcome = read_scores(answer, 2)
    assert outcome.scores[1] is None
    assert outcome.failures[-1].kind == kind
    assert outcome.failures[-1].sample == 1
    assert why in outcome.failures[-1].message


def test_an_answer_may_have_scores_and_errors() -> None:
    error = {"sample": 1, "kind": "raised", "message": "no"}
    outcome = read_scores({"scores": [1.0, None, None], "errors": [error]}, 3)
    assert outcome.scores == (1.0, None, None)  # the last: no opinion
    assert [(failure.sample, failure.kind) for failure in outcome.failures] == [(1, "raised")]
    outcome = read_scores({"errors": [error]}, 2)
    assert [(failure.sample, failure.kind) for failure in outcome.failures] == [(0, "refused"), (1, "raised")]
    sound = read_scores({"scores": [1, -0.5], "errors": [], "more": 1}, 2)
    assert sound == GroupOutcome(scores=(1.0, -0.5), failures=())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"scores": ' + "[" * 100_000])
def test_an_answer_that_is_nested_too_deep_is_refused(text: str) -> None:
    with served(FakeService(200, text=text)) as url:
        for judge in (None, judge_of()):
            (failure,) = ask(spec(url, judge=judge), ["a"]).failures
            assert (failure.kind, failure.message[:22]) == ("refused", "its answer is not JSON")


def test_limits_of_a_group_and_a_token_in_no_repr_and_no_fingerprint() -> None:
    url, judge = "http://127.0.0.1:9/", judge_of()
    with closing(RewardSet([replace(spec(url), only={"kind": ("code",)})], timeout_s=1.0)) as rewards:
        assert rewards.ask(PROMPT, ["a"], truncated=[False]) == {}  # the reward does not apply to the row's kind
    assert ask_deadline_s([spec(url)], 8) == 5.0 + 10.0
    assert ask_deadline_s([spec(url), spec(url, judge=judge)], 8) == 8 * 5.0 + 10.0
    assert ask_deadline_s([spec(url), spec(url, max_in_flight=1)], 8) == 4 * 5.0 + 10.0
    assert ask_deadline_s([spec(url, max_in_flight=9), spec(url, judge=judge)], 8) == 9 * 8 / 4 * 5.0 + 10.0
    assert asks_in_flight([spec(url), spec(url, max_in_flight=9)]) == 9
    assert asks_in_flight([RewardSpec(name="taste", weight=1.0, function=None)]) == 0
    one, other = spec("http://h/", token="s3cret"), spec("http://h/", token="0ther", timeout_s=0.5)
    assert "s3cret" not in repr(one)
    assert fingerprint([one], model="") == fingerprint([other], model="") != fingerprint([spec("http://i/")], model="")


def test_closing_ends_what_is_under_way() -> None:
    asked = threading.Event()

    async def handler(request: web.Request) -> web.Response:
        asked.set()
        await asyncio.sleep(300)
        return web.Response()

    with served(handler) as url, ThreadPoolExecutor() as threads:
        rewards = RemoteRewards({"style": spec(url, timeout_s=300.0, deadline_s=300.0).remote})  # type: ignore[dict-item]
        asking = threads.submit(rewards.ask, ["style"], PROMPT, ["a"], truncated=[False])
        assert asked.wait(60.0)
        rewards.close()
        with pytest.raises(RunError, match="closed while a group was being scored"):
            asking.result(60.0)


def says(text: str | None, **rest: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, **rest}]}


def score_of(spec: JudgeSpec, answer: dict[str, Any]) -> float:
    return verdict(spec, {}, answer)[""]


def test_the_question() -> None:
    spec = judge_of(prompt='{{"q": {prompt}}} {response} {answer} {meta}', system="Be fair.", request={"seed": 3})
    assert spec.columns == ("answer", "meta")
    values = {"prompt": "p {response}", "response": "r", "answer": "a", "meta": {"k": "ü"}, "other": 1}
    assert question(spec, values) == {
        "model": "m",
        "seed": 3,
        "messages": [
            {"role": "system", "content": "Be fair."},
            {"role": "user", "content": '{"q": p {response}} r a {"k": "ü"}'},  # filled in once
        ],
    }
    spec = judge_of()  # the standard question needs no column
    assert spec.columns == ()
    body = question(spec, {"prompt": "P", "response": "R"})
    assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
    assert score_of(spec, says("It is fine, score: 3 at first. Score: 5.5")) == 0.5  # (5.5 - 1) / 9


def test_the_last_number_on_the_scale() -> None:
    worth = {"Score: 10": 1.0, "score 1": 0.0, "**Score:** 4": 1 / 3, "Score: 2\nScore: 7": 2 / 3}
    assert {text: score_of(judge_of(), says(text)) for text in worth} == pytest.approx(worth)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says("good"), "no match of `pattern`: 'good'"),
        (says("Score: 11"), "gives 11, which is not on the scale from 1 to 10"),
        (says("Score: -3"), "gives -3"),
        (says("Let me think", finish_reason="length"), "truncated at its limit of tokens"),
        ({}, r"no choices\[0\].message.content"),
        ({"choices": []}, r"no choices\[0\].message.content"),
        (says(None), r"no choices\[0\].message.content"),
        ({"choices": [{"text": "Score: 3"}]}, r"no choices\[0\].message.content"),
    ],
)
def test_an_answer_off_the_scale_or_of_no_completion_is_no_low_score(answer: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        score_of(judge_of(), answer)


def test_choices_stand_alone_and_the_last_counts() -> None:
    spec = judge_of(choices={"YES": 1.0, "NO": 0.0, "NOT SURE": 0.25})
    assert score_of(spec, says("NO... no, YES")) == 1.0
    assert score_of(spec, says("I say NOT SURE")) == 0.25
    with pytest.raises(ValueError, match="contains none of the choices YES, NO, NOT SURE: 'NOBODY KNOWS'"):
        score_of(spec, says("NOBODY KNOWS"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prompt": "no place"}, "must hold {response}"),
        ({"prompt": "{response.__class__}"}, "braces hold the name of a column"),
        ({"prompt": "{response} {"}, "Single"),
        ({"pattern": "score"}, "no group"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"scale": (3.0, 3.0)}, "must rise"),
        ({"request": {"messages": []}}, "may not have messages"),
    ],
)
def test_bad_settings(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        judge_of(**given)
