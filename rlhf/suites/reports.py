"""Turn the answers of suites into reports, samples and error records of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.evaluation.results import Marking, PromptResult, SetReport, prompt_reports, prompt_rows
from rlhf.evaluation.statistics import Estimate
from rlhf.suites.spec import Question, SuiteAnswers
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.samples import SampleRecord

_UNMARKED = Marking(ks=(), passing=None, answers=None)
_OF_RESPONSES = ("truncated", "response_tokens")


def suite_reports(
    suites: Sequence[SuiteAnswers], against: Sequence[SuiteAnswers] | None, *, seed: int
) -> list[SetReport]:
    """Return a report of each suite, and of each task of a suite with several tasks, as SUITE.TASK."""
    reports = []
    for index, suite in enumerate(suites):
        drawn = any(question.response_tokens for question in suite.questions)
        other = None if against is None else against[index]
        for report in prompt_reports(
            suite_name(suite),
            _results(suite),
            _UNMARKED,
            against=None if other is None else _results(other),
            sources={question.number: _name(question.task) for question in suite.questions if question.task},
            prompt_ids=[question.number for question in suite.questions],
            seed=seed,
        ):
            theirs = None if report.against is None or other is None else _metrics(report.against, other, drawn)
            reports.append(replace(report, metrics=_metrics(report.metrics, suite, drawn), against=theirs))
    return reports


def suite_rows(model: str, suites: Sequence[SuiteAnswers]) -> list[dict[str, Any]]:
    """Return lines of samples.jsonl, a line per answered question."""
    rows = []
    for suite in suites:
        asked = {question.number: question for question in suite.questions}
        for row in prompt_rows(model, suite_name(suite), _results(suite), _UNMARKED):
            question = asked[row["prompt_id"]]
            rows.append(row | {"task": question.task, "target": question.target})
    return rows


def suite_samples(suites: Sequence[SuiteAnswers], *, version: int) -> list[SampleRecord]:
    """Return the answered questions as samples of a run."""
    return [
        SampleRecord(
            split=suite_name(suite),
            group_id=question.number,
            prompt_id=question.number,
            sample=0,
            prompt=question.prompt,
            response=question.response,
            score=question.score,
            scores=question.values,
            truncated=question.truncated,
            response_tokens=question.response_tokens,
            min_version=version,
            max_version=version,
            columns={"target": question.target, **({} if question.task is None else {"task": question.task})},
        )
        for suite in suites
        for question in suite.questions
        if question.failure is None
    ]


def suite_failures(suites: Sequence[SuiteAnswers], *, step: int, model: str | None = None) -> Iterator[ErrorRecord]:
    """Yield a record of each question without an answer."""
    for suite in suites:
        for question in suite.questions:
            if question.failure is not None:
                yield ErrorRecord(
                    step=step,
                    stage="eval",
                    kind="unanswered",
                    message=question.failure,
                    source=question.task,
                    split=suite_name(suite),
                    model=model,
                    prompt_id=question.number,
                )


def suite_name(suite: SuiteAnswers) -> str:
    return _name(suite.name)


def _name(text: str) -> str:
    """Return a name for metrics: some of the library's names have brackets."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)


def _results(suite: SuiteAnswers) -> list[PromptResult]:
    return [_result(question) for question in suite.questions if question.failure is None]


def _result(question: Question) -> PromptResult:
    return PromptResult(
        prompt_id=question.number,
        prompt=question.prompt,
        responses=(question.response,),
        scores=() if question.score is None else (question.score,),
        by_name={name: (value,) for name, value in question.values.items()},
        answers=None,
        truncated=(question.truncated,),
        response_tokens=(question.response_tokens,),
    )


def _metrics(metrics: Mapping[str, Estimate], suite: SuiteAnswers, drawn: bool) -> dict[str, Estimate]:
    """Return metrics with the suite's totals, under the library's names. `drawn`: whether the model wrote responses."""
    kept = {name: value for name, value in metrics.items() if drawn or name not in _OF_RESPONSES}
    totals = {name: Estimate(value=value, low=None, high=None) for name, value in suite.totals.items()}
    return {name.removeprefix("rewards/"): value for name, value in kept.items()} | totals
