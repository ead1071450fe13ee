"""Suites: fixed questions, answers over HTTP with failures and repetitions, and the reports of both."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web

from rlhf.errors import RunError, UserError
from rlhf.evaluation.results import Evaluation
from rlhf.evaluation.statistics import better_chance
from rlhf.suites import process
from rlhf.suites.client import Answer, Ask, Client
from rlhf.suites.harness import _totals
from rlhf.suites.prompts import Prompts
from rlhf.suites.reasoning import REASONING_SUITES, ask_reasoning, reasoning_rows
from rlhf.suites.reports import suite_failures, suite_reports, suite_rows, suite_samples
from rlhf.suites.spec import Endpoint, Question, SuiteAnswers, SuiteSpec

Handler = Callable[[dict[str, Any]], web.Response]


@pytest.fixture
def front() -> Iterator[Callable[[Handler], str]]:
    """Return a function that serves a handler of completions, and returns its base URL."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()

    runners: list[web.AppRunner] = []

    def serve(handler: Handler) -> str:
        async def start() -> str:
            async def answer(request: web.Request) -> web.Response:
                return handler(await request.json())

            app = web.Application()
            app.router.add_post("/v1/completions", answer)
            runner = web.AppRunner(app)
            runners.append(runner)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        return asyncio.run_coroutine_threadsafe(start(), loop).result(10)

    yield serve
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def completion(text: str, tokens: int = 3, reason: str = "stop") -> web.Response:
    choice = {"text": text, "finish_reason": reason}
    return web.json_response({"choices": [choice], "usage": {"completion_tokens": tokens}})


def client(stored: Path, *urls: str) -> Client:
    endpoint = Endpoint(urls=urls, key="secret", deadline_s=5.0, answers=stored / "answers.jsonl")
    return Client(endpoint, lambda done, total: None)


def asks(*numbers: int) -> list[Ask]:
    return [Ask(prompt_ids=(1, number), sampling={"max_tokens": 4, "temperature": 0.0}) for number in numbers]


def test_the_questions_of_a_suite_never_change() -> None:
    """Numbers of two versions are comparable only if the questions, examples and answers are the same."""
    assert list(REASONING_SUITES) == ["reasoning-basic"]
    rows = reasoning_rows("reasoning-basic")
    assert len(rows) == 192
    text = json.dumps([[row["task"], row["messages"], row["answer"]] for row in rows])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "13dcd266346dcc7d"


def test_a_limit_takes_the_first_questions_of_each_task(tiny_model: Path) -> None:
    spec = SuiteSpec(names=("reasoning-basic",), limit=2, tokenizer=str(tiny_model))
    measured = Client(None, lambda done, total: None)
    asked = ask_reasoning("reasoning-basic", spec, measured, Prompts(spec))
    assert [question.task for question in asked.questions] == 2 * list(REASONING_SUITES["reasoning-basic"])
    assert measured.longest > 512  # the longest prompt with the 512 tokens of a response
    assert {question.score for question in asked.questions} == {0.0}  # the empty answers of a client without a front


def test_a_failed_request_is_counted_and_named(front: Callable[[Handler], str], tmp_path: Path) -> None:
    def handler(body: dict[str, Any]) -> web.Response:
        assert body["model"] == "suites"
        if body["prompt"][1] == 7:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return completion(str(body["prompt"][1]), reason="length" if body["prompt"][1] == 9 else "stop")

    answers = client(tmp_path, front(handler)).answer(asks(5, 7, 9))
    assert answers[0] == Answer(text="5", tokens=3)
    assert answers[1].failure == "HTTP 400: too long"
    assert answers[2].truncated


def test_the_next_engine_answers_for_a_dead_engine(front: Callable[[Handler], str], tmp_path: Path) -> None:
    alive = front(lambda body: completion("yes"))
    answers = client(tmp_path, "http://127.0.0.1:9", alive).answer(asks(1, 2))
    assert [answer.text for answer in answers] == ["yes", "yes"]


def suite_process(urls: list[str], tmp_path: Path, tokenizer: Path) -> list[SuiteAnswers]:
    """Ask one question of each task through the real process. Each call of the fronts takes the next URL."""
    spec = SuiteSpec(names=("reasoning-basic",), limit=1, tokenizer=str(tokenizer))

    async def fronts(key: str, name: str) -> list[str]:
        return [urls.pop(0)]

    asking = process.ask_suites(
        spec, fronts, stored=tmp_path / "stored.jsonl", deadline_s=5.0, progress=lambda done, total: None
    )
    return asyncio.run(asking)


def test_without_any_answer_the_suite_fails(front: Callable[[Handler], str], tmp_path: Path, tiny_model: Path) -> None:
    broken = front(lambda body: web.json_response({"error": {"message": "no"}}, status=401))
    with pytest.raises(
        RunError, match=r"suite reasoning-basic: no question has an answer \(8\); the first: HTTP 401: no"
    ):
        suite_process([broken], tmp_path, tiny_model)


def test_questions_of_a_lost_engine_are_asked_once_more(
    front: Callable[[Handler], str], tmp_path: Path, tiny_model: Path
) -> None:
    (suite,) = suite_process(["http://127.0.0.1:9", front(lambda body: completion("4"))], tmp_path, tiny_model)
    assert {question.response for question in suite.questions} == {"4"}


def test_an_interrupted_suite_continues(front: Callable[[Handler], str], tmp_path: Path) -> None:
    """Stored answers are not asked for again. An unfinished last line and a failed request are."""
    seen: list[int] = []
    refused = {3}

    def handler(body: dict[str, Any]) -> web.Response:
        seen.append(body["prompt"][1])
        is_refused = body["prompt"][1] in refused
        return web.json_response({"error": {"message": "no"}}, status=400) if is_refused else completion("yes")

    url, stored = front(handler), tmp_path / "answers.jsonl"
    client(tmp_path, url).answer(asks(1, 2, 3))
    lines = stored.read_text().splitlines()
    assert len(lines) == 2
    stored.write_text("\n".join(lines)[:-20])  # the process was killed while it wrote
    seen.clear()
    refused.clear()
    answers = client(tmp_path, url).answer(asks(1, 2, 3))
    assert [answer.text for answer in answers] == 3 * ["yes"]
    assert sorted(seen) in ([1, 3], [2, 3])
    assert len(stored.read_text().splitlines()) == 3


def test_log_probabilities_are_those_of_the_last_tokens(front: Callable[[Handler], str], tmp_path: Path) -> None:
    def handler(body: dict[str, Any]) -> web.Response:
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 1)
        ranks = [None, {"8": {"logprob": -9.0, "rank": 4}}, {"6": {"logprob": -1.5, "rank": 1}}]
        last = {"5": {"logprob": -2.0, "rank": 2}, "4": {"logprob": -0.5, "rank": 1}}
        return web.json_response({"choices": [{"prompt_logprobs": [*ranks, last]}]})

    url = front(handler)
    two = Ask(prompt_ids=(1, 8, 6, 5), scored=2, sampling={})
    assert client(tmp_path, url).answer([two]) == [Answer(logprob=-3.5, is_greedy=False)]


def question(number: int, score: float | None, failure: str | None = None, task: str | None = None) -> Question:
    values = {} if score is None else {"exact_match.strict-match": score}
    texts = {"prompt": f"question {number}", "response": "4", "target": "5"}
    counts: dict[str, Any] = {"truncated": False, "response_tokens": 2}
    return Question(number=number, task=task, score=score, values=values, failure=failure, **texts, **counts)


def test_reports_leave_out_and_count_unanswered_questions() -> None:
    questions = (question(0, 1.0, task="a"), question(1, 0.0, task="b"), question(2, 0.0, "HTTP 400: no", task="b"))
    suites = [SuiteAnswers(name="maths (x)", questions=questions, totals={"f1": 0.25})]
    whole, a, b = suite_reports(suites, None, seed=0)
    assert (whole.name, a.name, b.name) == ("maths_x_", "maths_x_.a", "maths_x_.b")
    assert (whole.num_rows, whole.num_failed, b.num_failed) == (2, 1, 1)
    assert {name: estimate.value for name, estimate in whole.metrics.items()} == {
        "score": 0.5,
        "exact_match.strict-match": 0.5,
        "truncated": 0.0,
        "response_tokens": 2.0,
        "f1": 0.25,
    }
    evaluation = Evaluation(model="m", against=None, seed=0, samples=None, sets=(whole, a, b))
    assert evaluation.to_metrics()["eval/maths_x_/exact_match.strict-match"] == 0.5
    (failure,) = suite_failures(suites, step=4)
    assert (failure.message, failure.split, failure.prompt_id, failure.step) == ("HTTP 400: no", "maths_x_", 2, 4)
    assert [sample.prompt_id for sample in suite_samples(suites, version=4)] == [0, 1]
    row = suite_rows("m", suites)[0]
    assert (row["set"], row["score"], row["target"], row["task"], row["response"]) == ("maths_x_", 1.0, "5", "a", "4")


def test_two_models_are_compared_question_by_question() -> None:
    """Of three questions, the model is right on all, the other on the first and on an unanswered one."""
    ours = SuiteAnswers(name="s", questions=tuple(question(number, 1.0) for number in range(4)))
    failed = question(3, 0.0, "no answer within 5 s")
    theirs = SuiteAnswers(name="s", questions=(question(0, 1.0), question(1, 0.0), question(2, 0.0), failed))
    (report,) = suite_reports([ours], [theirs], seed=0)
    assert report.metrics["win_rate"].value == pytest.approx((0.5 + 1 + 1) / 3)
    # Equal only if all three draws are the first question: 1/27, and a tie counts half.
    assert report.metrics["better"].value == pytest.approx(1 - 0.5 / 27, abs=0.01)
    assert report.against is not None
    assert report.against["score"].value == pytest.approx(1 / 3)


def test_a_question_without_a_score_counts_in_the_other_metrics_only() -> None:
    (report,) = suite_reports([SuiteAnswers(name="s", questions=(question(0, 1.0), question(1, None)))], None, seed=0)
    assert (report.num_rows, report.metrics["score"].value, report.metrics["response_tokens"].value) == (2, 1.0, 2.0)


def test_only_numbers_become_totals() -> None:
    """The library's correlation is not a number if all answers are equal, and eval.json holds numbers only."""
    metrics = {"alias": "s", "f1,none": 0.5, "pearson,none": float("nan"), "f1_stderr,none": "N/A"}
    assert _totals(metrics, [question(0, 1.0)]) == {"f1": 0.5}


def test_both_models_have_their_totals() -> None:
    ours, theirs = (SuiteAnswers(name="s", questions=(question(0, 1.0),), totals={"f1": f1}) for f1 in (0.5, 0.25))
    (report,) = suite_reports([ours], [theirs], seed=0)
    assert report.against is not None
    assert (report.metrics["f1"].value, report.against["f1"].value) == (0.5, 0.25)


def test_the_probability_to_be_better_by_hand() -> None:
    assert better_chance([1.0, 0.0], [0.0, 1.0], seed=0) == pytest.approx(0.5, abs=0.02)
    assert better_chance([1.0, 1.0], [1.0, 1.0], seed=0) == 0.5
    assert better_chance([0.0], [1.0], seed=0) == 0.0


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import sys; sys.exit('the library broke')", RunError, "the process of suites s died:\nthe library broke"),
        ("import time; time.sleep(60)", RunError, "suites s: no progress within 1 s"),
    ],
)
def test_a_process_without_results_is_named(
    code: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(program))
    monkeypatch.setattr(process, "PREPARES_WITHIN_S", 1.0)
    with pytest.raises(error, match=message):
        asyncio.run(process.plan_suites(SuiteSpec(names=("s",), tokenizer="none")))


def test_what_a_library_prints_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy.py").write_text("""\
import os, pathlib, sys
from rlhf.suites import program

program.answers_of = lambda *_: (print("a line"), os.system("echo a child"), ([], 7))[2]
sys.exit(program.main(pathlib.Path(sys.argv[3])))
""")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/noisy.py "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(python))
    assert asyncio.run(process.plan_suites(SuiteSpec(names=("s",), tokenizer="none"))).longest == 7


def test_nothing_is_fetched_where_data_comes_from_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    there = process._environment(SuiteSpec(names=("s",), tokenizer="t", data="/data"))
    assert (there["HF_HUB_OFFLINE"], there["HF_DATASETS_OFFLINE"]) == ("1", "1")
    assert there["NLTK_DATA"] == "/data/nltk_data"
    hub = process._environment(SuiteSpec(names=("s",), tokenizer="t"))
    assert "HF_HUB_OFFLINE" not in hub
    assert hub["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_the_process_says_what_the_user_must_change() -> None:
    missing = SuiteSpec(names=("gsm9k",), tokenizer="none", data="/nonexistent")
    with pytest.raises(UserError, match=r"pip install 'ray-rlhf\[suites\]'|unknown to lm-eval .* Near names: .*gsm8k"):
        asyncio.run(process.plan_suites(missing))
