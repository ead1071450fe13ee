"""Tasks of lm-evaluation-harness, with data from a folder. The data has the schema of the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from aiohttp import web

from rlhf.errors import UserError
from rlhf.suites import process
from rlhf.suites.program import answers_of
from rlhf.suites.reports import suite_reports
from rlhf.suites.spec import SuiteAnswers, SuiteSpec

pytest.importorskip("lm_eval", reason="needs the extra `suites`")

PENS = "Ann has {} boxes with {} pens each. How many pens does Ann have?"
CHOICES = [("A", ["gas", "metal", "stone"]), ("B", ["water", "ice", "sand"]), ("B", ["a dog", "a long snake", "rain"])]


def write_copy(folder: Path, name: str, config: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a copy of a data set's repository on the hub, with the same rows in each split."""
    (folder / name / config).mkdir(parents=True)
    splits = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "validation", "test"))
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{splits}---\n"
    (folder / name / "README.md").write_text(card)
    for split in ("train", "validation", "test"):
        file = folder / name / config / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets"
    products = [(a, a + 1, a * (a + 1)) for a in range(2, 10)]
    pens = [{"question": PENS.format(a, b), "answer": f"They are {a}*{b}.\n#### {c}"} for a, b, c in products]
    write_copy(folder, "openai/gsm8k", "main", pens)
    arc = []
    for i, (key, texts) in enumerate(CHOICES):
        choices = {"text": texts, "label": ["A", "B", "C"]}
        arc.append({"id": f"q{i}", "question": f"Which one, {i}?", "choices": choices, "answerKey": key})
    write_copy(folder, "allenai/ai2_arc", "ARC-Easy", arc)
    return folder


async def ask(spec: SuiteSpec, folder: Path, bodies: list[dict[str, Any]]) -> list[SuiteAnswers]:
    """Ask a front that answers 42 to every question, and gives each token of a prompt the log-probability -1."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        bodies.append(body)
        if "prompt_logprobs" in body:
            entries = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in body["prompt"][1:])]
            return web.json_response({"choices": [{"prompt_logprobs": entries}]})
        choice = {"text": " 6 times 7 is 42.\n#### 42", "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 9}})

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()

    async def fronts(key: str, name: str) -> list[str]:
        return [f"http://127.0.0.1:{runner.addresses[0][1]}"]

    try:
        progress = lambda done, total: None  # noqa: E731
        return await process.ask_suites(spec, fronts, stored=folder / "stored", deadline_s=20.0, progress=progress)
    finally:
        await runner.cleanup()


def test_tasks_of_the_library_grade_responses_and_likelihoods(copies: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of 8 products one is 42. The likeliest choice has the fewest tokens, and is right twice in three."""
    spec = SuiteSpec(names=("gsm8k", "arc_easy"), tokenizer=str(tiny_model), data=str(copies))
    plan = asyncio.run(process.plan_suites(spec))
    assert plan.questions == 11
    assert plan.longest > 256  # a response of gsm8k may have 256 tokens
    suites = asyncio.run(ask(spec, tmp_path, []))
    gsm8k, arc = suite_reports(suites, None, seed=0)
    assert {name: estimate.value for name, estimate in gsm8k.metrics.items()} == {
        **dict.fromkeys(("score", "exact_match.strict-match", "exact_match.flexible-extract"), 0.125),
        "truncated": 0.0,
        "response_tokens": 9.0,
    }
    assert suites[0].totals == {}  # the library's own numbers are the same means
    question = suites[0].questions[4]
    assert PENS.format(6, 7) in question.prompt.splitlines()[-1] + question.prompt
    assert (question.score, question.response.endswith("#### 42")) == (1.0, True)
    assert arc.metrics["score"].value == pytest.approx(2 / 3)
    assert [question.response for question in suites[1].questions] == ["gas", "ice", "rain"]
    assert "response_tokens" not in arc.metrics


def test_each_repeat_of_a_question_has_a_seed(copies: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The majority of 64 responses is wanted. With one seed, an engine would give the same response 64 times."""
    bodies: list[dict[str, Any]] = []
    names = ("gsm8k_cot_self_consistency",)
    spec = SuiteSpec(names=names, limit=2, seed=5, tokenizer=str(tiny_model), data=str(copies))
    (suite,) = asyncio.run(ask(spec, tmp_path, bodies))
    assert sorted(body["seed"] for body in bodies) == sorted([*range(5, 69)] * 2)
    assert {body["temperature"] for body in bodies} == {0.2}
    assert len(suite.questions) == 2


@pytest.fixture(scope="module")
def indexed() -> Any:
    """Return the library's index of all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def planned(indexed: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that plans suites in this process, and returns the number of questions."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: indexed)

    def plan(*names: str, data: Path | None = None, limit: int | None = None) -> int:
        spec = SuiteSpec(names=names, limit=limit, tokenizer=str(tiny_model), data=None if data is None else str(data))
        suites, _ = answers_of(spec, None, lambda done, total: None)
        return sum(len(suite.questions) for suite in suites)

    return plan


def test_each_folder_has_its_rows(copies: Path, planned: Callable[..., int]) -> None:
    """The cache of `datasets` knows folders by their last names. A second folder has other rows."""
    other = copies.parent / "other"
    write_copy(other, "openai/gsm8k", "main", [{"question": "1+1?", "answer": "#### 2"}] * 7)
    assert [planned("gsm8k", data=folder) for folder in (copies, other)] == [8, 7]


def test_a_limit_and_a_missing_data_set(copies: Path, planned: Callable[..., int]) -> None:
    assert planned("gsm8k", data=copies, limit=3) == 3
    with pytest.raises(UserError, match=r"Suite hellaswag: data set Rowan/hellaswag cannot be loaded: .* hf download"):
        planned("hellaswag", data=copies)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", r"Suite gsm9k is unknown to lm-eval .*\. Near names: gsm8k"),
        ("reasoning_basic", "Near names: reasoning-basic"),
    ],
)
def test_unknown_names_are_refused_with_near_names(name: str, message: str, planned: Callable[..., int]) -> None:
    with pytest.raises(UserError, match=message):
        planned(name)
