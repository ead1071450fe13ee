"""Hold the results of prompts and examples, and compute the metrics of a set as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf.evaluation import statistics
from rlhf.evaluation.passing import PassRule, judges
from rlhf.evaluation.voting import AnswerForm, answer_form
from rlhf.types import is_unnamed

if TYPE_CHECKING:
    from rich.table import Table

    from rlhf.rewards.scoring import RewardSpec
    from rlhf.rollouts.records.texts import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Scores of all responses to a prompt, an entry per response."""

    prompt_id: int  # row of the set
    scores: tuple[float, ...]  # weighted sum of the rewards
    by_name: Mapping[str, tuple[float | None, ...]]
    # each applicable reward, before its gate and weight; None: no opinion on the response
    answers: tuple[str | None, ...] | None  # answers for the majority vote; None: responses do not vote
    truncated: tuple[bool, ...]
    response_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult(PromptScores):
    """Scores of all responses to a prompt, with the texts."""

    prompt: str
    responses: tuple[str, ...]
    transcripts: tuple[Transcript, ...] | None = None  # of conversations with an environment


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleResult:
    """Sums over the tokens of one supervised example under the loss mask."""

    num_tokens: int
    logprob: float
    num_top1: int  # tokens with the largest probability


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The user's settings for grading responses. None: derived from the number of samples and the rewards.

    Args:
        ks (K,K): the numbers k of pass@k and maj@k; 1, 2, 4 and so on if not given.
        pass_score (X): the score from which a response passes, in place of a value of 1 of the judging function.
        answers: the part of a response used as a vote in maj@k.
        by (COLUMN): report each value of this column as well as the whole set.
        exchange_images: measure each set with images once more, where each row has the image of another row.
    """

    ks: tuple[int, ...] | None = None
    pass_score: float | None = None
    answers: AnswerForm | None = None
    by: str | None = None
    exchange_images: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """Resolved settings for grading responses beyond their scores."""

    ks: tuple[int, ...]
    passing: PassRule | None  # None: neither pass@k nor maj@k
    answers: AnswerForm | None  # None: no maj@k

    def gives(self, metric: str) -> bool:
        """Return whether responses can be graded for this metric. Only pass@k and maj@k need settings."""
        kind, at, _ = metric.partition("@")
        return not at or (self.passing is not None and (kind != "maj" or self.answers is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    name: str
    num_rows: int  # rows with results
    num_failed: int  # prompts without a score
    metrics: Mapping[str, statistics.Estimate]
    against: Mapping[str, statistics.Estimate] | None = None  # metrics of the compared model; None: no comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics of one model on all sets, as written to eval.json."""

    model: str
    against: str | None
    seed: int
    samples: int | None  # responses to a prompt; None: no set has prompts
    passing: str | None = None  # what a response needs to pass, in words; None: no response is graded
    sets: tuple[SetReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with sets and metrics by name."""
        report = asdict(self)
        report["sets"] = {values.pop("name"): values for values in report["sets"]}
        return report

    def to_metrics(self) -> dict[str, float]:
        """Return the metrics in a run's form: eval/<set>/<metric>.

        A reward appears under the reward's name. The score's interval is included.
        """
        logged: dict[str, float] = {}
        for report in self.sets:
            values = {name.removeprefix("rewards/"): estimate.value for name, estimate in report.metrics.items()}
            score = report.metrics.get("score")
            if score is not None and score.low is not None and score.high is not None:
                values |= {"score_low": score.low, "score_high": score.high}
            logged |= {f"eval/{report.name}/{name}": value for name, value in values.items()}
        return logged

    def to_table(self) -> Table:
        """Return a table for a terminal, with a line per metric."""
        from rich.table import Table

        is_graded = any("@" in metric for report in self.sets for metric in report.metrics)
        table = Table(
            title=self.model if self.against is None else f"{self.model} against {self.against}",
            caption=f"A response passes with {self.passing}." if is_graded and self.passing is not None else None,
        )
        columns = [("set", "left"), ("metric", "left"), ("value", "right"), ("95 % interval", "right")]
        if self.against is not None:
            columns.append((self.against, "right"))
        for heading, justify in columns:
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for report in self.sets:
            for index, (name, estimate) in enumerate(report.metrics.items()):
                low, high = estimate.low, estimate.high
                interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
                heading = f"{report.name} ({report.num_rows})" if index == 0 else ""
                other = None if report.against is None else report.against.get(name)
                others = [] if self.against is None else ["" if other is None else str(other)]
                table.add_row(heading, name, f"{estimate.value:.4g}", interval, *others)
            table.add_section()
        return table


def prompt_reports(
    name: str,
    results: Sequence[PromptScores],
    marking: Marking,
    *,
    against: Sequence[PromptScores] | None = None,
    sources: Mapping[int, str],
    prompt_ids: Sequence[int],
    seed: int,
) -> list[SetReport]:
    """Return a set's report, and a report named NAME.SOURCE for each source with results.

    sources: source by prompt id, empty for a set without sources. prompt_ids: ids of all prompts, also of prompts
    without results.
    """
    parts: dict[str, Sequence[int]] = {name: prompt_ids}
    for source in sorted(set(sources.values())):
        parts[f"{name}.{source}"] = [prompt_id for prompt_id in prompt_ids if sources[prompt_id] == source]
    reports = []
    for part, ids in parts.items():
        wanted = set(ids)
        selected = [result for result in results if result.prompt_id in wanted]
        if selected:
            metrics, failed = prompt_metrics(selected, against, marking, seed=seed), len(ids) - len(selected)
            theirs = [result for result in against or () if result.prompt_id in wanted]
            others = prompt_metrics(theirs, None, marking, seed=seed) if theirs else None
            report = SetReport(name=part, num_rows=len(selected), num_failed=failed, metrics=metrics, against=others)
            reports.append(report)
    return reports


def prompt_metrics(
    results: Sequence[PromptScores], against: Sequence[PromptScores] | None, marking: Marking, *, seed: int
) -> dict[str, statistics.Estimate]:
    """Return the metrics of a set of prompts. Each metric is a number per prompt, averaged over prompts.

    against: another model's results, compared on the shared prompts. Without shared prompts there is no win rate.
    """

    def over_prompts(values: Sequence[float]) -> statistics.Estimate:
        return statistics.mean_estimate(values, seed=seed)

    means = [_mean(result.scores) for result in results if result.scores]
    metrics = {"score": over_prompts(means)} if means else {}
    names = dict.fromkeys(name for result in results for name in result.by_name)
    for name in [name for name in names if not is_unnamed(name)]:  # others differ from row to row
        opinions = [[v for v in result.by_name.get(name, ()) if v is not None] for result in results]
        if any(opinions):
            metrics[f"rewards/{name}"] = over_prompts([_mean(values) for values in opinions if values])
    if marking.passing is not None:
        passed = [marking.passing.passed(result.scores, result.by_name) for result in results]
        for k in marking.ks:
            metrics[f"pass@{k}"] = over_prompts([statistics.pass_at_k(marks, k=k) for marks in passed])
        both = zip(results, passed, strict=True)
        voting = [(result.answers, marks) for result, marks in both if result.answers is not None]
        for k in [k for k in marking.ks if k > 1] if voting else ():  # the majority of one response is pass@1
            metrics[f"maj@{k}"] = over_prompts([statistics.maj_at_k(answers, marks, k=k) for answers, marks in voting])
    other_scores = {result.prompt_id: result.scores for result in against or () if result.scores}
    shared = [result for result in results if result.prompt_id in other_scores and result.scores]
    if wins := [statistics.win_chance(result.scores, other_scores[result.prompt_id]) for result in shared]:
        metrics["win_rate"] = over_prompts(wins)
        ours, theirs = [_mean(r.scores) for r in shared], [_mean(other_scores[r.prompt_id]) for r in shared]
        better = statistics.better_chance(ours, theirs, seed=seed)
        metrics["better"] = statistics.Estimate(value=better, low=None, high=None)
    metrics["truncated"] = over_prompts([_mean(result.truncated) for result in results])
    metrics["response_tokens"] = over_prompts([_mean(result.response_tokens) for result in results])
    return metrics


def marking_of(marks: Marks, rewards: Sequence[RewardSpec], *, samples: int) -> Marking:
    """Return the resolved grading settings. Without a threshold for the score, a reward function decides.

    Scores of reward models have no default threshold. ValueError for a k outside 1 to the number of samples.
    """
    ks = statistics.powers_of_two(samples) if marks.ks is None else tuple(sorted(set(marks.ks)))
    for k in ks:
        if not 1 <= k <= samples:
            raise ValueError(f"is {k}, expected 1 to the number of samples, {samples}")
    functions = [spec.function for spec in rewards if spec.function is not None and spec.weight != 0.0]
    forms = [answer_form(function.function, function.source.args) for function in functions]
    named = {spec.name: spec for spec in rewards}
    able = judges((s.name, None if s.function is None else s.function.function, s.weight) for s in rewards)
    rule = PassRule(judges={name: named[name].gate for name in able}, pass_score=marks.pass_score)
    return Marking(
        ks=ks,
        passing=None if marks.pass_score is None and not able else rule,
        answers=marks.answers or next((form for form in forms if form is not None), None),
    )


def example_metrics(results: Sequence[ExampleResult], *, seed: int) -> dict[str, statistics.Estimate]:
    """Return the metrics of a set of examples, as means over all tokens under the loss mask.

    The loss is in nats; perplexity = exp(loss).
    """
    tokens = [float(result.num_tokens) for result in results]
    loss = statistics.ratio_estimate([-result.logprob for result in results], tokens, seed=seed)
    return {
        "loss": loss,
        "perplexity": statistics.Estimate(value=math.exp(loss.value), low=_exp(loss.low), high=_exp(loss.high)),
        "token_accuracy": statistics.ratio_estimate([float(result.num_top1) for result in results], tokens, seed=seed),
    }


def prompt_rows(model: str, name: str, results: Sequence[PromptResult], marking: Marking) -> list[dict[str, Any]]:
    """Return lines of samples.jsonl, a line per response. `answer` and `passed` are null without grading."""
    rule = marking.passing
    passed = [None if rule is None else rule.passed(result.scores, result.by_name) for result in results]
    return [
        {
            "model": model,
            "set": name,
            "prompt_id": result.prompt_id,
            "sample": sample,
            "prompt": result.prompt,
            "response": response,
            "score": result.scores[sample] if result.scores else None,
            "scores": {reward: values[sample] for reward, values in result.by_name.items()},
            "passed": None if marks is None else marks[sample],
            "answer": None if result.answers is None else result.answers[sample],
            "truncated": result.truncated[sample],
            "response_tokens": result.response_tokens[sample],
            **({} if result.transcripts is None else asdict(result.transcripts[sample])),  # response, turns, tokens
        }
        for result, marks in zip(results, passed, strict=True)
        for sample, response in enumerate(result.responses)
    ]


def example_rows(model: str, name: str, results: Sequence[ExampleResult]) -> list[dict[str, Any]]:
    """Return lines of samples.jsonl, one per example in the order of the set."""
    return [{"model": model, "set": name, "example_id": i, **asdict(result)} for i, result in enumerate(results)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)
