"""Score responses to held-out prompts under the current weights, with intervals and by source, and compare the
responses with a teacher."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlhf.config.derive import has_named_teachers, teacher_of, teachers
from rlhf.config.schema.rewards import error_rules
from rlhf.config.schema.root import Config
from rlhf.controller.learning import Signals
from rlhf.controller.record import RunRecord
from rlhf.controller.rollout_report import group_samples
from rlhf.controller.rollout_scorer import RolloutScorer, request_for
from rlhf.errors import RunError
from rlhf.evaluation.results import Evaluation, Marking, PromptScores, SetReport, prompt_reports
from rlhf.evaluation.statistics import mean_estimate
from rlhf.rewards.failure_rule import ends_run, held_out_rules
from rlhf.rewards.scoring import describe_errors
from rlhf.roles import CompletedGroup, OnlineTeacherRole, RewardRole, SampleSelection, ScoredGroup
from rlhf.suites.process import ask_suites
from rlhf.suites.reports import suite_failures, suite_reports, suite_samples
from rlhf.suites.spec import SuiteAnswers, SuiteSpec
from rlhf.tracking.metrics.reductions import Last, Mean
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.folder import evaluation_path
from rlhf.tracking.run_folder.samples import samples_path, write_samples
from rlhf.types import Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """Held-out prompts. `sources` maps prompt ids to their source, if the set is split by source."""

    prompts: tuple[Prompt, ...]
    sources: Mapping[int, str]


async def score_held_out(
    sets: Mapping[str, EvalSet],
    config: Config,
    marking: Marking,
    scorer: RolloutScorer,
    *,
    step: int,
    suites: SuiteSpec | None = None,
) -> dict[str, list[ScoredGroup]]:
    """Answer and score every set and suite with the weights of a step. Returns the scored groups of each set.

    Writes values to the step's row, intervals to evals/, and responses to the samples. RunError: a reward with
    `on_error: fail` failed, or a set has no score at all.
    """
    assert config.rollouts is not None
    settings, record = config.eval, scorer.record
    sampling = Sampling(
        max_new_tokens=config.rollouts.max_new_tokens,
        temperature=settings.temperature,
        stop=config.rollouts.stop,
        stop_token_ids=config.rollouts.stop_token_ids,
    )
    selections: list[SampleSelection] = []
    reports: list[SetReport] = []
    answered: dict[str, list[ScoredGroup]] = {}
    group_ids = itertools.count(-1, -1)  # negative: not in the prompt stream

    async def score(name: str, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[ScoredGroup]:
        shared: Any = {"samples": samples, "run_seed": config.run.seed}
        requests = [
            request_for(prompt, group_id=next(group_ids), first_sequence_id=index * samples, **shared)
            for index, prompt in enumerate(prompts)
        ]
        groups = await scorer.score_all(requests, sampling, step=step, version=step, split=name)
        return _sound(groups, config, scorer, where=f"eval {name}, step {step}")

    with record.stage("eval", role="rollout"):
        for name, held_out in sets.items():
            groups = await score(name, held_out.prompts, sampling, settings.samples_per_prompt)
            results = await _results(groups, marking, scorer.reward)
            prompt_ids = [prompt.prompt_id for prompt in held_out.prompts]
            set_reports = prompt_reports(
                name, results, marking, sources=held_out.sources, prompt_ids=prompt_ids, seed=config.run.seed
            )
            if settings.greedy:
                groups_of_one = await score(name, held_out.prompts, replace(sampling, temperature=0.0), 1)
                greedy = mean_estimate([scored.scores.scores[0] for scored in groups_of_one], seed=config.run.seed)
                set_reports[0] = replace(set_reports[0], metrics={**set_reports[0].metrics, "greedy": greedy})
            reports += set_reports
            answered[name] = groups
            selections += group_samples(groups, Signals(), split=name, most=None)
        answered_suites = [] if suites is None else await _ask_suites(suites, config, scorer, step=step)
        reports += suite_reports(answered_suites, None, seed=config.run.seed)
        whole = Evaluation(
            model=config.run.name,
            against=None,
            seed=config.run.seed,
            samples=settings.samples_per_prompt,
            passing=None if marking.passing is None else str(marking.passing),
            sets=tuple(reports),
        )
        record.add({name: Last(value=value) for name, value in whole.to_metrics().items()})
        text = json.dumps(whole.to_json(), indent=2, allow_nan=False) + "\n"
        write_atomic(evaluation_path(record.folder.path, step), text)
        path = samples_path(record.folder.scratch, step)
        if selections:
            await scorer.reward.write_samples(path, selections)
        if answered_suites:
            await asyncio.to_thread(write_samples, path, suite_samples(answered_suites, version=step))
    return answered


async def _ask_suites(suites: SuiteSpec, config: Config, scorer: RolloutScorer, *, step: int) -> list[SuiteAnswers]:
    """Ask the suites over the engines' fronts, and record the questions without an answer."""
    stored = scorer.record.folder.scratch / "suite_answers.jsonl"
    stored.unlink(missing_ok=True)
    deadline_s, show = config.cluster.call_timeout_s, partial(scorer.record.show, "eval")
    answers = await ask_suites(suites, scorer.rollout.fronts, stored=stored, deadline_s=deadline_s, progress=show)
    for failure in suite_failures(answers, step=step):
        scorer.record.tracker.log_error(failure)
    return answers


def _sound(groups: Sequence[ScoredGroup], config: Config, scorer: RolloutScorer, *, where: str) -> list[ScoredGroup]:
    """Return the groups without failed rewards. Raise RunError if a failure ends the run, or if no group is left."""
    sound = [scored for scored in groups if not scored.scores.errors]
    failures = [scored.scores.errors for scored in groups if scored.scores.errors]
    rules = held_out_rules(error_rules(config.rewards)), config.reward_policy.on_error
    fatal = [errors for errors in failures if ends_run(errors, *rules)]
    if fatal or not sound:
        scorer.forget_untrained()
        raise RunError(f"{where}: {describe_errors((fatal or failures)[0])}")
    return sound


async def compare_with_teacher(
    answered: Mapping[str, Sequence[ScoredGroup]], config: Config, teacher: OnlineTeacherRole, record: RunRecord
) -> None:
    """Record how much likelier each response is under the student than under the teacher, per token. Greedy responses
    are compared at temperature 1, as the engine reports greedy logprobs at temperature 1."""
    settings = config.eval
    with record.stage(teacher.role):
        for name, groups in answered.items():
            draws: Any = {
                "temperature": settings.temperature or 1.0,
                "samples_per_prompt": settings.samples_per_prompt,
            }
            theirs = await mean_logprobs([scored.group for scored in groups], config, teacher, **draws)
            for scored in groups:
                of = teacher_of(config, scored.group.request.prompt.columns)
                infos = [info for info in scored.group.infos if info.sequence_id in theirs]
                gaps = [info.num_response_tokens * (info.mean_logprob - theirs[info.sequence_id]) for info in infos]
                mean = Mean(total=sum(gaps), count=sum(info.num_response_tokens for info in infos))
                record.add({f"eval/{name}/kl_teacher": mean})
                if has_named_teachers(config):
                    record.add({f"eval/{name}/kl_teacher/{of}": mean})


def in_turn(config: Config, teacher: OnlineTeacherRole) -> list[str]:
    """Return the teachers in the order of the fewest changes on the devices: the present teacher is first."""
    return sorted(teachers(config), key=lambda name: name != teacher.present)


async def mean_logprobs(
    groups: Sequence[CompletedGroup],
    config: Config,
    teacher: OnlineTeacherRole,
    *,
    temperature: float,
    samples_per_prompt: int,
) -> Mapping[int, float]:
    """Return the mean log-probability of each response under the teacher of its prompt, by sequence id."""
    means: dict[int, float] = {}
    for name in in_turn(config, teacher):
        own = [group for group in groups if teacher_of(config, group.request.prompt.columns) == name]
        if own:
            means |= await teacher.mean_logprobs(
                own, temperature=temperature, samples_per_prompt=samples_per_prompt, teacher=name
            )
    return means


async def _results(groups: Sequence[ScoredGroup], marking: Marking, reward: RewardRole) -> list[PromptScores]:
    votes: list[tuple[str | None, ...] | None] = [None] * len(groups)
    if marking.passing is not None and marking.answers is not None:
        votes = list(await asyncio.gather(*(reward.answers(scored.group, marking.answers) for scored in groups)))
    return [
        PromptScores(
            prompt_id=scored.group.request.prompt.prompt_id,
            scores=scored.scores.scores,
            by_name=scored.scores.measured,
            answers=response_answers,
            truncated=tuple(info.finish_reason == "length" for info in scored.group.infos),
            response_tokens=tuple(info.num_response_tokens for info in scored.group.infos),
        )
        for scored, response_answers in zip(groups, votes, strict=True)
    ]
