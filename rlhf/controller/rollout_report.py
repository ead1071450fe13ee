"""Compute metrics and sample records of scored groups, from scalars alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from rlhf.controller.learning import Signals
from rlhf.roles import Metrics, SampleSelection, ScoredGroup
from rlhf.tracking.metrics.histograms import LAG_EDGES, TOKEN_EDGES
from rlhf.tracking.metrics.reductions import Histogram, Max, Mean, Reduction, Std, Sum
from rlhf.tracking.run_folder.samples import SampleRecord, sample_columns, sample_value
from rlhf.types import RESULT_COLUMN, RolloutInfo, is_unnamed

T = TypeVar("T")


def rollout_metrics(groups: Sequence[ScoredGroup], *, version: int) -> Metrics:
    """Return `rollouts/*` and `rewards/*` of a batch trained on by weights of `version`."""
    infos = [info for scored in groups for info in scored.group.infos]
    scores = [score for scored in groups for score in scored.scores.scores]
    lengths = [float(info.num_response_tokens) for info in infos]
    prompts = [float(info.num_prompt_tokens) for info in infos]
    lags = [float(version - info.min_version) for info in infos if info.num_response_tokens] or [0.0]
    metrics: dict[str, Reduction] = {
        "rollouts/response_tokens/mean": Mean.of(lengths),
        "rollouts/response_tokens/max": Max(value=max(lengths)),
        "rollouts/response_tokens/histogram": Histogram.of(lengths, edges=TOKEN_EDGES),
        "rollouts/prompt_tokens/mean": Mean.of(prompts),
        "rollouts/truncated/fraction": Mean.of([float(info.finish_reason == "length") for info in infos]),
        "rollouts/tokens/total": Sum(total=float(sum(info.num_tokens for info in infos))),
        "rollouts/logprob/mean": Mean(
            total=sum(info.mean_logprob * info.num_response_tokens for info in infos), count=sum(lengths)
        ),
        "experience/policy_lag/max": Max(value=max(lags)),
        "experience/policy_lag/mean": Mean.of(lags),
        "experience/policy_lag/histogram": Histogram.of(lags, edges=LAG_EDGES),
        **_conversation_metrics(infos),
        **_session_metrics(infos),
    }
    if scores:
        metrics |= {"rewards/score/mean": Mean.of(scores), "rewards/score/std": Std.of(scores)}
    greedy = [scored.greedy_score for scored in groups if scored.greedy_score is not None]
    if greedy:
        metrics["rewards/greedy/mean"] = Mean.of(greedy)
    for name, values in by_reward(scored.scores.measured for scored in groups).items():
        if is_unnamed(name):
            continue  # another criterion in each row
        opinions = [value for value in values if value is not None]
        if opinions:
            metrics[f"rewards/{name}/mean"] = Mean.of(opinions)
        if len(opinions) < len(values) and "/" not in name:
            silent = len(values) - len(opinions)
            metrics[f"rewards/{name}/no_opinion/fraction"] = Mean(total=silent, count=len(values))
    for name, responses in by_reward(scored.scores.steps for scored in groups).items():
        step_values = [step.value for steps in responses for step in steps]
        metrics[f"rewards/{name}/steps/mean"] = Mean.of([float(len(steps)) for steps in responses])
        metrics[f"rewards/{name}/step/mean"] = Mean.of(step_values)
        metrics[f"rewards/{name}/step/std"] = Std.of(step_values)
    return metrics


def by_reward(columns: Iterable[Mapping[str, Sequence[T]]]) -> dict[str, list[T]]:
    """Join the columns of all groups by reward. Rewards without an applicable response are absent."""
    whole: dict[str, list[T]] = {}
    for rewards in columns:
        for name, values in rewards.items():
            whole.setdefault(name, []).extend(values)
    return whole


def _conversation_metrics(infos: Sequence[RolloutInfo]) -> dict[str, Reduction]:
    """Return metrics of conversations with an environment; empty for single turns."""
    if infos[0].environment_reward is None:
        return {}
    turns = [float(info.num_turns) for info in infos]
    return {
        "rollouts/turns/mean": Mean.of(turns),
        "rollouts/turns/max": Max(value=max(turns)),
        "rollouts/environment_tokens/mean": Mean.of([float(info.num_environment_tokens) for info in infos]),
    }


def _session_metrics(infos: Sequence[RolloutInfo]) -> dict[str, Reduction]:
    """Return metrics of an agent's sessions; empty without an agent."""
    ends = [info.session for info in infos if info.session is not None]
    if not ends:
        return {}
    calls = [float(end.num_calls) for end in ends]
    reasons = Counter(reason for end in ends for reason in end.broken)
    restricted = restricted_tokens(infos)
    num_restricted, num_trained = restricted.total(), sum(info.num_response_tokens for info in infos)
    return {
        **{f"agents/broken_by_{reason.replace(' ', '_')}/total": Sum(total=float(n)) for reason, n in reasons.items()},
        **{f"agents/restricted_by_{reason}/total": Sum(total=float(n)) for reason, n in restricted.items()},
        "agents/restricted_tokens/fraction": Mean(total=num_restricted, count=num_restricted + num_trained),
        "agents/calls/mean": Mean.of(calls),
        "agents/calls/max": Max(value=max(calls)),
        "agents/broken_prefixes/fraction": Mean(total=sum(len(end.broken) for end in ends), count=sum(calls)),
        "agents/inserted_tokens/mean": Mean.of([float(info.num_environment_tokens) for info in infos]),
    }


def restricted_tokens(infos: Iterable[RolloutInfo]) -> Counter[str]:
    """Count the sampled tokens left out of training because of a grammar, by the reason for the grammar."""
    counts: Counter[str] = Counter()
    for info in infos:
        if info.session is not None:
            counts.update(info.session.restricted)
    return counts


def environment_failures(infos: Sequence[RolloutInfo]) -> dict[str, Reduction]:
    """Count the failures of environments or agents in a group, even in a dropped group; empty for single turns."""
    kinds = [info.environment_error.kind for info in infos if info.environment_error is not None]
    failed, late = Sum(total=float(len(kinds))), Sum(total=float(kinds.count("timeout")))
    if infos[0].session is not None:
        return {"agents/errors/total": failed, "agents/timeouts/total": late}
    if not kinds and infos[0].environment_reward is None:
        return {}
    return {"rollouts/environment_errors/total": failed, "rollouts/environment_timeouts/total": late}


def group_samples(
    groups: Sequence[ScoredGroup], signals: Signals, *, split: str, most: int | None
) -> list[SampleSelection]:
    """Return records of the first `most` responses (None: all), group by group, without their text."""
    selections: list[SampleSelection] = []
    left = sys.maxsize if most is None else most
    for scored in groups:
        if not left:
            break
        request, taken, records = scored.group.request, scored.group.infos[:left], []
        left -= len(taken)
        columns = sample_columns(request.prompt.columns)
        for sample, info in enumerate(taken):
            steps = {  # step ends count from the end of the prompt, like the positions of a sample's tokens
                name: tuple(replace(step, end=step.end - info.num_prompt_tokens) for step in by_sample[sample])
                for name, by_sample in scored.scores.steps.items()
            }
            values = {f"columns.{name}": value for name, value in columns.items()}
            if info.session is not None and info.session.result is not None:
                values[RESULT_COLUMN] = sample_value(json.loads(info.session.result))
            sequence = signals.reports.get(info.sequence_id)
            records.append(
                SampleRecord(
                    split=split,
                    group_id=request.group_id if split == "train" else request.prompt.prompt_id,
                    prompt_id=request.prompt.prompt_id,
                    sample=sample,
                    prompt=request.prompt.text,
                    response="",
                    score=scored.scores.scores[sample] if scored.scores.scores else None,
                    scores={name: values[sample] for name, values in scored.scores.measured.items()},
                    steps=steps,
                    advantage=signals.advantages.get(info.sequence_id),
                    preferred=signals.preferred.get(info.sequence_id),
                    truncated=info.finish_reason == "length",
                    response_tokens=info.num_response_tokens,
                    min_version=info.min_version,
                    max_version=info.max_version,
                    mean_rollout_logprob=info.mean_logprob,
                    mean_old_logprob=None if sequence is None else sequence.mean_old_logprob,
                    mean_ref_logprob=None if sequence is None else sequence.mean_ref_logprob,
                    turns=None if info.environment_reward is None and info.session is None else (),
                    mean_teacher_logprob=signals.teacher_logprobs.get(info.sequence_id),
                    broken=None if info.session is None else info.session.broken,
                    columns={name: column.value for name, column in columns.items()},
                    result=values[RESULT_COLUMN].value if RESULT_COLUMN in values else None,
                    shortened={name: shown.length for name, shown in values.items() if shown.length is not None},
                    masked=tuple(name for name, shown in values.items() if shown.is_masked),
                )
            )
        ids = tuple(info.sequence_id for info in taken)
        selections.append(SampleSelection(rollouts=scored.group.rollouts, records=tuple(records), sequence_ids=ids))
    return selections
