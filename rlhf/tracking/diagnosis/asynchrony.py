"""Symptoms of rollouts ahead of training: a side that waits, and old responses with their correction."""

from __future__ import annotations

import math

from rlhf.tracking.diagnosis.findings import HEAD, History, Point, mean, symptom
from rlhf.tracking.formatting import number

STARVED = 0.5  # of the time, while rollouts run ahead of training
LAGGING, LAG_GROWTH = 0.03, 3.0  # nats, and times the difference at a smaller lag: below, accuracy stayed
FALL = 0.1  # of the best mean score of ten steps, which may be negative
CORRECTED = 0.3  # of the tokens: a correction is meant for few tokens, with a ratio far from 1
REASKED = 0.1  # of the groups in flight, in each step
BIASED = 0.9  # of the mean length: batches of one run differ by less


@symptom(
    "notice",
    *("time/trainer_waits_s", "time/step_s", "experience/policy_lag/mean"),
    steps=HEAD,
    why="The engines need longer for a batch than a training step takes, so the trainers wait for the engines.",
    advice="give the engines more devices (cluster.roles.rollout.engines); between batches set rollouts.oversample "
    "above 1, in flight raise rollouts.max_staleness.",
)
def trainer_starved(history: History, _: list[Point]) -> str | None:
    if not _runs_ahead(history):  # in turns, training always waits
        return None
    share = _waiting(history)
    return f"Training waits for responses in {share:.0%} of the time." if share > STARVED else None


@symptom(
    "notice",
    *("time/engines_idle/fraction", "experience/policy_lag/mean"),
    steps=HEAD,
    why="A training step takes longer than the engines need for a batch, so the engines wait for the trainers.",
    advice="give the policy more devices (cluster.roles.policy.workers) and the engines fewer.",
)
def engines_starved(history: History, recent: list[Point]) -> str | None:
    if not _runs_ahead(history):
        return None
    share = mean(recent)
    return f"The engines are idle in {share:.0%} of the time." if share > STARVED else None


@symptom(
    "warning",
    *("experience/rollout_logprob_diff/mean", "experience/policy_lag/mean", "rewards/score/mean"),
    *("experience/rollout_ess_token",),
    steps=HEAD,
    why="The policy has moved far from the older weights that sampled its responses: on responses of newer weights, "
    "sampler and trainer differed much less. Such responses no longer show how to improve the policy.",
    advice="lower train.lr or rollouts.max_staleness; or choose another preset of algorithm.correction: for short "
    "responses sequence_mis, which leaves out the responses that the policy would hardly give any more.",
)
def lag_lowers_the_score(history: History, recent: list[Point]) -> str | None:
    lags, scores = history.last("experience/policy_lag/mean", HEAD), history.since("rewards/score/mean", 0)
    lag_of = {point.step: point.value for point in history.first("experience/policy_lag/mean")}
    start = history.first("experience/rollout_logprob_diff/mean")
    newer = [point.value for point in start if lags and lag_of.get(point.step, math.inf) < mean(lags) - 0.5]
    if not newer or len(scores) < 2 * HEAD:
        return None
    level, before = mean(recent), min(newer)
    best = max(mean(scores[at : at + HEAD]) for at in range(len(scores) - HEAD))
    if level < LAGGING or level < LAG_GROWTH * before or mean(scores[-HEAD:]) > best - FALL * abs(best):
        return None
    return (
        f"Sampler and trainer differ by {number(level)} nats a token at a lag of {number(mean(lags))} versions, and "
        f"differed by {number(before)} at a smaller lag. The score fell from {number(best)} to "
        f"{number(mean(scores[-HEAD:]))}."
    )


@symptom(
    "warning",
    *("experience/rollout_weight_truncated/fraction", "experience/rollout_weight_masked/fraction"),
    *("experience/policy_lag/mean", "experience/rollout_ess_token"),
    steps=3,
    why=(
        "The policy moves so far within the lag of its responses that the correction changes many responses instead "
        "of only a few. A gradient of changed weights is biased."
    ),
    advice="lower rollouts.max_staleness or train.lr; or choose another preset of algorithm.correction.",
)
def correction_clips(history: History, recent: list[Point]) -> str | None:
    lags = history.last("experience/policy_lag/mean", 3)
    masked = history.last("experience/rollout_weight_masked/fraction", 3)
    if not lags or mean(lags) == 0.0:
        return None
    share = mean(recent) + (mean(masked) if masked else 0.0)
    return f"The correction truncates or masks {share:.0%} of the tokens." if share > CORRECTED else None


@symptom(
    "warning",
    *("rollouts/reasked_groups/total", "rollouts/in_flight/mean", "rollouts/response_tokens/max"),
    steps=HEAD,
    why="Responses to these prompts were older than the bound before they could be trained. Their tokens are lost, and "
    "slow prompts are affected most.",
    advice="set rollouts.batch_order to prompt, so that batches wait for slow prompts; or raise "
    "rollouts.max_staleness.",
)
def groups_reasked(history: History, recent: list[Point]) -> str | None:
    in_flight = history.last("rollouts/in_flight/mean", HEAD)
    if not in_flight or mean(recent) <= REASKED * mean(in_flight):
        return None
    return f"{number(mean(recent))} groups a step are requested again; {number(mean(in_flight))} are in flight."


@symptom(
    "warning",
    *("rollouts/completion_bias", "rollouts/response_tokens/mean", "rollouts/reasked_groups/total"),
    steps=HEAD,
    why=(
        "Batches are filled in the order of completion, so short responses are trained before long responses. The "
        "policy learns from fewer long responses than the engines sample."
    ),
    advice="set rollouts.batch_order to prompt.",
)
def short_responses_first(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return f"Trained responses have {level:.0%} of the length of all responses." if level < BIASED else None


def _runs_ahead(history: History) -> bool:
    """Return whether the engines sample later batches during training. Continued responses are old in turns too."""
    lags = history.last("experience/policy_lag/mean", HEAD)
    return bool(lags) and mean(lags) > 0.0 and not history.last("rollouts/carried/fraction", 1)


def _waiting(history: History) -> float:
    """Return the share of the time in which training waited in the last steps; 0 if unknown."""
    waits, steps = history.last("time/trainer_waits_s", HEAD), history.last("time/step_s", HEAD)
    return mean(waits) / mean(steps) if waits and steps else 0.0
