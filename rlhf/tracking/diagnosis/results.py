"""Checks of scores and held-out results: no signal, reward hacking, overfitting, truncated or shrinking responses.

Each check is pure: it takes a history and returns a finding or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from rlhf.tracking.diagnosis.findings import Finding, History, Point, mean, say

ALIKE = 1e-6  # a smaller deviation counts as zero: scores are floats
ZERO_GROUPS = 0.9  # of the prompts: a tenth of the batch does all the teaching
FILTERED = 0.8  # of the answered groups: four of five are generated in vain
TRUNCATED = 0.3  # of the responses: a truncated response rarely scores, so the policy learns length
TRUNCATED_RISE, LONGER = 0.15, 1.2  # more truncated responses and a fifth more tokens: length runs away
SHRUNK, WORTH_SHRINKING = 0.2, 20  # fraction of the first length; only for responses with some tokens
SCORE_RISE = 0.25  # of the scores' deviation: beyond the noise of five batches
EVAL_FALL, EVAL_NOISE = 0.2, 6.0  # both: of the best value; and times the evaluations' noise, since all are looked at
OVERFIT = 1.05  # times the lowest held-out loss: beyond the noise of an evaluation
FLAT, FLAT_EVALS, FLAT_STEPS = 0.02, 5, 20  # spread of the evaluations, as a share of the largest
CHANCE, CHANCE_STEPS = 0.55, 30  # accuracy of pairs; .5 is a coin

_LOSSES = ("loss", "nll", "perplexity", "kl_teacher")  # evaluation metrics for which lower is better
_NEUTRAL = (
    *("response_tokens", "truncated", "score_low", "score_high", "margin", "mismatched_kl"),
    *("chosen_reward", "rejected_reward", "calibration_error"),
)


def rewards_alike(history: History) -> Finding | None:
    recent = history.last("rewards/score/std", 5)
    if not recent or any(point.value > ALIKE for point in recent):
        return None
    level = history.newest("rewards/score/mean")
    return Finding(
        kind="rewards_alike",
        severity="failure",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=("rewards/score/std", "rewards/score/mean"),
        what=f"All responses of the last 5 steps scored the same{f' ({say(level.value)})' if level else ''}.",
        why="A reward with equal scores teaches nothing: it does not find the answer in the response, "
        "the task is out of reach or solved, or every response fails its format.",
        advice="score some of samples/ by hand with `rlhf reward`; take prompts of another difficulty.",
    )


def groups_alike(history: History) -> Finding | None:
    key = "advantages/zero_groups/fraction"
    recent = history.last(key, 5)
    if not recent or mean(recent) <= ZERO_GROUPS:
        return None
    score = history.newest("rewards/score/mean")
    return Finding(
        kind="groups_alike",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "rewards/score/mean", "update/entropy/mean"),
        what=f"The responses to {say(100 * mean(recent))} % of the prompts all score the same"
        f"{f'; the mean score is {say(score.value)}' if score else ''}.",
        why="A group without differences has advantages of 0, so nearly all of the batch teaches nothing. The prompts "
        "are too easy (a high score), too hard (a low one), or the samples of a group are copies.",
        advice="rollouts.dynamic_sampling replaces such groups; data.curriculum asks what is within reach; more "
        "rollouts.samples_per_prompt find differences.",
    )


def advantages_zero(history: History) -> Finding | None:
    recent, scores = history.last("advantages/std", 3), history.last("rewards/score/std", 3)
    if not recent or any(point.value > ALIKE for point in recent):
        return None
    if not scores or any(point.value <= ALIKE for point in scores):  # reported by rewards_alike
        return None
    return Finding(
        kind="advantages_zero",
        severity="failure",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=("advantages/std", "rewards/score/std"),
        what=f"Advantages have no deviation, though scores have one of {say(mean(scores))}.",
        why="Scores differ between prompts only, and not within a group; so no response is better than its group.",
        advice="more rollouts.samples_per_prompt, a higher rollouts.temperature, or rollouts.dynamic_sampling.",
    )


def mostly_filtered(history: History) -> Finding | None:
    key = "rollouts/filtered_groups/fraction"
    recent = history.last(key, 5)
    if not recent or mean(recent) <= FILTERED:
        return None
    return Finding(
        kind="mostly_filtered",
        severity="notice",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "rollouts/filtered_easy/fraction", "rollouts/filtered_hard/fraction"),
        what=f"{say(100 * mean(recent))} % of the answered groups are filtered and replaced.",
        why="Most of the generation goes to prompts that teach nothing.",
        advice="data.curriculum asks measured prompts by what they taught; or take data of another difficulty.",
    )


def much_truncated(history: History) -> Finding | None:
    key, length = "rollouts/truncated/fraction", "rollouts/response_tokens/mean"
    recent, tokens = history.last(key, 5), history.last(length, 5)
    start, began = history.first(key, 5), history.first(length, 5)
    if not recent or not tokens:
        return None
    longer = mean(tokens) > LONGER * mean(began)
    rises = longer and mean(recent) > mean(start) + TRUNCATED_RISE
    if mean(recent) <= TRUNCATED and not rises:
        return None
    grown = f"; they grew from {say(mean(began))} to {say(mean(tokens))} tokens" if longer else ""
    return Finding(
        kind="length_runs_away" if rises else "much_truncated",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, length, "rewards/score/mean"),
        what=f"{say(100 * mean(recent))} % of the responses are cut off{grown}.",
        why="A cut response has no answer to score. Where length grows with it, the policy is paid for length, or "
        "never learns to end a response.",
        advice="raise rollouts.max_new_tokens; set algorithm.overlong or a reward's truncated_score; see whether the "
        "samples repeat themselves.",
    )


def responses_shrink(history: History) -> Finding | None:
    key = "rollouts/response_tokens/mean"
    recent, start = history.last(key, 5), history.first(key, 5)
    if not recent or mean(start) < WORTH_SHRINKING or mean(recent) >= SHRUNK * mean(start):
        return None
    return Finding(
        kind="responses_shrink",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "rewards/score/mean"),
        what=f"Responses shrank from {say(mean(start))} to {say(mean(recent))} tokens.",
        why="Short responses score best: the reward or its penalties favour brevity, or the policy has given up "
        "reasoning for guessing.",
        advice="read the samples; check the weight of length penalties in rewards, and algorithm.aggregation.",
    )


def held_out_falls(history: History) -> Finding | None:
    """Report reward hacking if the training score rises while held-out results fall; otherwise report a
    lost ability.
    """
    rise = _score_rise(history)
    for key, points in _better_if_higher(history):
        fallen = _fallen(points)
        if fallen is None:
            continue
        best, level = fallen
        hacking = rise is not None
        meanwhile = f" while the training score rose from {say(rise[0])} to {say(rise[1])}" if rise is not None else ""
        return Finding(
            kind="reward_hacking" if hacking else "held_out_falls",
            severity="failure" if hacking else "warning",
            first_step=best.step,
            last_step=history.step,
            metrics=(key, *(("rewards/score/mean", "experience/kl_ref/mean") if hacking else ("update/loss/mean",))),
            what=f"{key} fell from {say(best.value)} (step {best.step}) to {say(level)}{meanwhile}.",
            why="The policy exploits the reward instead of solving the task: it scores by the reward's "
            "weakness, not by the task."
            if hacking
            else "The model loses what it could do before: too many steps or too high a learning rate on this data.",
            advice=(
                "read the best-scored samples; raise algorithm.kl.coef; fix the reward or add a verifier; "
                if hacking
                else "lower train.lr; "
            )
            + _keep(best),
        )
    return None


def held_out_loss_rises(history: History) -> Finding | None:
    for key, points in history.evals().items():
        if key.rpartition("/")[2] not in _LOSSES or len(points) < 3:
            continue
        lowest = min(points, key=lambda point: point.value)
        later = [point.value for point in points[-2:] if point.step > lowest.step]
        if len(later) < 2 or lowest.value <= 0 or min(later) <= OVERFIT * lowest.value:
            continue
        return Finding(
            kind="held_out_loss_rises",
            severity="warning",
            first_step=lowest.step,
            last_step=history.step,
            metrics=(key, "update/loss/mean"),
            what=f"{key} was lowest at step {lowest.step} ({say(lowest.value)}) and is {say(later[-1])} now.",
            why="The model memorises the training rows: it improves on them and gets worse on other rows.",
            advice=f"{_keep(lowest)} Fewer epochs, a lower train.lr, more data.",
        )
    return None


def held_out_flat(history: History) -> Finding | None:
    for key, points in history.evals().items():
        values = [point.value for point in points]
        if not key.endswith("/score") or len(points) < FLAT_EVALS or points[-1].step - points[0].step < FLAT_STEPS:
            continue
        if max(values) - min(values) > FLAT * max(map(abs, values)):
            continue
        return Finding(
            kind="held_out_flat",
            severity="notice",
            first_step=points[0].step,
            last_step=history.step,
            metrics=(key, "rewards/score/mean", "experience/kl_ref/mean"),
            what=f"{key} stayed between {say(min(values))} and {say(max(values))} over {len(points)} evaluations.",
            why="Training does not reach what is measured: the policy hardly moves (see the KL), the reward asks for "
            "something else, or there is nothing left to gain.",
            advice="if experience/kl_ref/mean is near 0, raise train.lr; compare rewards/score/mean; measure with the "
            "same reward and prompt format as in training.",
        )
    return None


def preferences_at_chance(history: History) -> Finding | None:
    key = "preference/accuracy/mean"
    recent = history.last(key, CHANCE_STEPS)
    online = bool(history.first("rollouts/tokens/total"))  # its pairs are new each step, and near a coin for long
    if online or not recent or mean(recent) >= CHANCE:
        return None
    return Finding(
        kind="preferences_at_chance",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "preference/margin/mean", "update/loss/mean"),
        what=f"Over {CHANCE_STEPS} steps {say(100 * mean(recent))} % of the pairs are ranked right; chance is 50 %.",
        why="The preferences teach nothing: the learning rate is too low, labels contradict each other, or "
        "chosen and rejected are swapped in part of the data.",
        advice="raise train.lr; read twenty pairs by hand; check the columns that data.columns names.",
    )


def _keep(best: Point) -> str:
    if best.step == 0:
        return "begin again from the model before training, which was better."
    return f"keep the checkpoint of step {best.step} (train.best_metric, train.early_stopping)."


def _score_rise(history: History) -> tuple[float, float] | None:
    """Return the training score at the beginning and now, if it rose beyond noise."""
    start, recent = history.first("rewards/score/mean", 5), history.last("rewards/score/mean", 5)
    spread = history.first("rewards/score/std", 5)
    if not recent or not spread or mean(recent) <= mean(start) + SCORE_RISE * mean(spread):
        return None
    return mean(start), mean(recent)


def _better_if_higher(history: History) -> Iterator[tuple[str, list[Point]]]:
    evals: Mapping[str, list[Point]] = history.evals()
    for key, points in evals.items():
        if key.rpartition("/")[2] not in (*_LOSSES, *_NEUTRAL):
            yield key, points


def _fallen(points: list[Point]) -> tuple[Point, float] | None:
    """Return the best evaluation and the mean of the last two, if both lie far below it."""
    if len(points) < 3:
        return None
    best = max(points, key=lambda point: point.value)
    later = [point for point in points[-2:] if point.step > best.step]
    limit = best.value - EVAL_FALL * abs(best.value)
    if len(later) < 2 or any(point.value >= limit for point in later) or best.value == 0:
        return None
    if best.value - mean(later) <= EVAL_NOISE * _noise(points, best):
        return None
    return best, mean(later)


def _noise(points: Sequence[Point], best: Point) -> float:
    """Return the standard deviation of a series around its trend, from second differences. They are 0 for a straight
    line.

    The difference at the best point is left out, because the trend turns there.
    """
    bends = [
        before.value - 2.0 * point.value + after.value
        for before, point, after in zip(points, points[1:], points[2:], strict=False)
        if point is not best
    ]
    return math.sqrt(fmean(bend * bend for bend in bends) / 6.0)


RESULTS: tuple[Callable[[History], Finding | None], ...] = (
    rewards_alike,
    groups_alike,
    advantages_zero,
    mostly_filtered,
    much_truncated,
    responses_shrink,
    held_out_falls,
    held_out_loss_rises,
    held_out_flat,
    preferences_at_chance,
)
