"""What an evaluation found: results of prompts and examples, the metrics of a set, the whole as JSON and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from rlhf.evaluation.statistics import (
    Estimate,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    powers_of_two,
    ratio_estimate,
    win_chance,
)
from rlhf.evaluation.voting import AnswerForm, answer_form

if TYPE_CHECKING:
    from rich.table import Table

    from rlhf.rewards.scoring import RewardSpec
    from rlhf.rollouts.records.texts import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """All responses to one prompt by their scores; one entry a response."""

    prompt_id: int  # row of the set
    scores: tuple[float, ...]  # weighted sum of the rewards
    by_name: Mapping[str, tuple[float | None, ...]]
    # each reward that applies, before its gate and weight; None: it has no opinion on the response
    answers: tuple[str | None, ...] | None  # by which responses vote; None: they do not
    truncated: tuple[bool, ...]
    response_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult(PromptScores):
    """The same with the text."""

    prompt: str
    responses: tuple[str, ...]
    transcripts: tuple[Transcript, ...] | None = None  # of conversations with an environment


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleResult:
    """What a model says of one supervised example: sums over its tokens that are to be learnt."""

    num_tokens: int
    logprob: float
    num_top1: int  # tokens that are the likeliest


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How a user wants responses marked. None: as follows from the number of samples and the rewards."""

    ks: tuple[int, ...] | None = None
    pass_score: float | None = None
    answers: AnswerForm | None = None
    by: str | None = None  # a column whose values split each set

    def over(self, other: Marks) -> Marks:
        """These, and what only the other says."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(other, **{name: value for name, value in said.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """How responses are marked beyond their scores."""

    ks: tuple[int, ...]
    pass_score: float | None  # a response with at least this score passes. None: no pass@k, no maj@k
    answers: AnswerForm | None  # None: no maj@k


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """One evaluation set."""

    name: str
    num_rows: int  # that have results
    num_failed: int  # prompts that a reward gave no score to
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model on all sets; eval.json is this."""

    model: str
    against: str | None
    seed: int
    samples: int | None  # responses to a prompt; None: no set has prompts
    sets: tuple[SetReport, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values, sets and metrics by name."""
        told = asdict(self)
        told["sets"] = {one.pop("name"): one for one in told["sets"]}
        return told

    def to_metrics(self) -> dict[str, float]:
        """As a run logs them: eval/<set>/<metric>, a reward under its name; of the score, its interval too."""
        logged = {}
        for one in self.sets:
            for name, found in one.metrics.items():
                logged[f"eval/{one.name}/{name.removeprefix('rewards/')}"] = found.value
            score = one.metrics.get("score")
            if score is not None and score.low is not None and score.high is not None:
                logged |= {f"eval/{one.name}/score_low": score.low, f"eval/{one.name}/score_high": score.high}
        return logged

    def to_table(self) -> Table:
        """For a terminal: one line a metric."""
        from rich.table import Table

        table = Table(title=self.model if self.against is None else f"{self.model} against {self.against}")
        for heading, justify in (("set", "left"), ("metric", "left"), ("value", "right"), ("95 % interval", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for one in self.sets:
            for index, (name, found) in enumerate(one.metrics.items()):
                interval = "" if found.low is None or found.high is None else f"{found.low:.4g} to {found.high:.4g}"
                table.add_row(
                    f"{one.name} ({one.num_rows})" if index == 0 else "", name, f"{found.value:.4g}", interval
                )
            table.add_section()
        return table


def prompt_reports(
    name: str,
    results: Sequence[PromptScores],
    marking: Marking,
    *,
    against: Sequence[PromptScores] | None = None,
    sources: Mapping[int, str],
    asked: Sequence[int],
    seed: int,
) -> list[SetReport]:
    """A set's report and, called NAME.SOURCE, one for each of its sources that has results.

    sources: by prompt id, of a set that is split by one. asked: the ids of all prompts, also those without results.
    """
    parts: dict[str, Sequence[int]] = {name: asked}
    for source in sorted(set(sources.values())):
        parts[f"{name}.{source}"] = [prompt_id for prompt_id in asked if sources[prompt_id] == source]
    reports = []
    for part, ids in parts.items():
        wanted = set(ids)
        found = [one for one in results if one.prompt_id in wanted]
        if found:
            metrics = prompt_metrics(found, against, marking, seed=seed)
            reports.append(SetReport(name=part, num_rows=len(found), num_failed=len(ids) - len(found), metrics=metrics))
    return reports


def prompt_metrics(
    results: Sequence[PromptScores], against: Sequence[PromptScores] | None, marking: Marking, *, seed: int
) -> dict[str, Estimate]:
    """Metrics of a set of prompts, each one number a prompt averaged over prompts.

    against: another model's results, compared on the prompts that both have; None, or no such prompt: no win rate.
    """

    def over_prompts(values: Sequence[float]) -> Estimate:
        return mean_estimate(values, seed=seed)

    found = {"score": over_prompts([_mean(one.scores) for one in results])} if results[0].scores else {}
    for name in dict.fromkeys(name for one in results for name in one.by_name):
        opinions = [[v for v in one.by_name.get(name, ()) if v is not None] for one in results]
        if any(opinions):
            found[f"rewards/{name}"] = over_prompts([_mean(values) for values in opinions if values])
    if marking.pass_score is not None:
        passed = [[score >= marking.pass_score for score in one.scores] for one in results]
        for k in marking.ks:
            found[f"pass@{k}"] = over_prompts([pass_at_k(marks, k=k) for marks in passed])
        voting = [(one.answers, marks) for one, marks in zip(results, passed, strict=True) if one.answers is not None]
        for k in marking.ks if voting else ():
            if k == 1:
                continue  # the majority of one response is that response: pass@1
            found[f"maj@{k}"] = over_prompts([maj_at_k(said, marks, k=k) for said, marks in voting])
    theirs = {one.prompt_id: one.scores for one in against or ()}
    wins = [win_chance(one.scores, theirs[one.prompt_id]) for one in results if one.prompt_id in theirs]
    if wins:
        found["win_rate"] = over_prompts(wins)
    found["truncated"] = over_prompts([_mean(one.truncated) for one in results])
    found["response_tokens"] = over_prompts([_mean(one.response_tokens) for one in results])
    return found


def marking_of(marks: Marks, rewards: Sequence[RewardSpec], *, samples: int) -> Marking:
    """Return how responses are marked. They pass with a score of 1 where a function with a weight is part of it.

    The scores of reward models have no such mark. ValueError for a k that is no number of samples.
    """
    ks = powers_of_two(samples) if marks.ks is None else tuple(sorted(set(marks.ks)))
    for k in ks:
        if not 1 <= k <= samples:
            raise ValueError(f"is {k}, expected 1 to the number of samples, {samples}")
    functions = [spec.function for spec in rewards if spec.function is not None and spec.weight != 0.0]
    forms = [answer_form(function.function, function.source.args) for function in functions]
    return Marking(
        ks=ks,
        pass_score=1.0 if marks.pass_score is None and functions else marks.pass_score,
        answers=marks.answers or next((form for form in forms if form is not None), None),
    )


def example_metrics(results: Sequence[ExampleResult], *, seed: int) -> dict[str, Estimate]:
    """Metrics of a set of examples, each a mean over all tokens to be learnt: loss in nats, perplexity = exp(loss)."""
    tokens = [float(one.num_tokens) for one in results]
    loss = ratio_estimate([-one.logprob for one in results], tokens, seed=seed)
    return {
        "loss": loss,
        "perplexity": Estimate(value=math.exp(loss.value), low=_exp(loss.low), high=_exp(loss.high)),
        "token_accuracy": ratio_estimate([float(one.num_top1) for one in results], tokens, seed=seed),
    }


def prompt_rows(model: str, name: str, results: Sequence[PromptResult], marking: Marking) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: one a response. `answer` and `passed` are null where they are not asked for."""
    return [
        {
            "model": model,
            "set": name,
            "prompt_id": one.prompt_id,
            "sample": sample,
            "prompt": one.prompt,
            "response": response,
            "score": one.scores[sample],
            "scores": {reward: values[sample] for reward, values in one.by_name.items()},
            "passed": None if marking.pass_score is None else one.scores[sample] >= marking.pass_score,
            "answer": None if one.answers is None else one.answers[sample],
            "truncated": one.truncated[sample],
            "response_tokens": one.response_tokens[sample],
            **({} if one.transcripts is None else _as_sampled(one.transcripts[sample])),
        }
        for one in results
        for sample, response in enumerate(one.responses)
    ]


def _as_sampled(conversation: Transcript) -> dict[str, Any]:
    """As a run's samples have them: what was sampled and what was told, turn by turn and token by token."""
    turns = [asdict(turn) for turn in conversation.turns]
    return {"turns": turns, "tokens": asdict(conversation.tokens)}


def example_rows(model: str, name: str, results: Sequence[ExampleResult]) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: one an example, in the order of the set."""
    return [{"model": model, "set": name, "example_id": i, **asdict(one)} for i, one in enumerate(results)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)
