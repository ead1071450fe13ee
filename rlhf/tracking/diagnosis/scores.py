"""Symptoms in scores and held-out results: no signal, reward hacking, overfitting, truncated or shrinking responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf.tracking.diagnosis.findings import Evidence, History, Point, mean, symptom
from rlhf.tracking.formatting import number

ALIKE = 1e-6  # a smaller deviation counts as zero: scores are floats
ZERO_GROUPS = 0.9  # of the prompts: a tenth of the batch does all the teaching
FILTERED = 0.8  # of the answered groups: four of five are generated in vain
TRUNCATED = 0.3  # of the responses: a truncated response rarely scores, so the policy learns length
TRUNCATED_RISE, LONGER = 0.15, 1.2  # more truncated responses and a fifth more tokens: length runs away
SHRUNK, WORTH_SHRINKING = 0.2, 20  # fraction of the first length; only for responses with some tokens
SCORE_RISE = 0.25  # of the scores' deviation: beyond the noise of five batches
EVAL_FALL, EVAL_NOISE = 0.2, 6.0  # of the best value, and times the evaluations' noise: both must be exceeded
OVERFIT = 1.05  # times the lowest held-out loss: beyond the noise of an evaluation
FLAT, FLAT_EVALS, FLAT_STEPS = 0.02, 5, 20  # spread of the evaluations, as a share of the largest
CHANCE, CHANCE_STEPS = 0.55, 30  # accuracy of pairs; .5 is a coin

_LOSSES = ("loss", "nll", "perplexity", "kl_teacher")  # evaluation metrics for which lower is better
_NEUTRAL = (
    *("response_tokens", "truncated", "score_low", "score_high", "margin", "mismatched_kl"),
    *("chosen_reward", "rejected_reward", "calibration_error"),
)


@symptom(
    "failure",
    *("rewards/score/std", "rewards/score/mean"),
    steps=5,
    why="Equal scores teach nothing. The reward may not find the answer in the response, the task may be out of reach "
    "or solved, or every response may fail its format.",
    advice="score some of samples/ by hand with `rlhf reward`; use prompts of another difficulty.",
)
def rewards_alike(history: History, recent: list[Point]) -> str | None:
    if any(point.value > ALIKE for point in recent):
        return None
    level = history.newest("rewards/score/mean")
    return f"All responses of the last 5 steps scored the same{f' ({number(level.value)})' if level else ''}."


@symptom(
    "warning",
    *("advantages/zero_groups/fraction", "rewards/score/mean", "update/entropy/mean"),
    steps=5,
    why="A group without differences has advantages of 0, so nearly all of the batch teaches nothing. The prompts are "
    "too easy (a high score), too hard (a low one), or the samples of a group are copies.",
    advice="set rollouts.dynamic_sampling, which replaces such groups, or data.curriculum, which chooses prompts "
    "within reach; more rollouts.samples_per_prompt find differences.",
)
def groups_alike(history: History, recent: list[Point]) -> str | None:
    if mean(recent) <= ZERO_GROUPS:
        return None
    score = history.newest("rewards/score/mean")
    mean_score = f"; the mean score is {number(score.value)}" if score else ""
    return f"The responses to {number(100 * mean(recent))} % of the prompts all score the same{mean_score}."


@symptom(
    "failure",
    *("advantages/std", "rewards/score/std"),
    steps=3,
    why="Scores differ only between prompts, and not within a group, so no response is better than its group.",
    advice="set more rollouts.samples_per_prompt, a higher rollouts.temperature, or rollouts.dynamic_sampling.",
)
def advantages_zero(history: History, recent: list[Point]) -> str | None:
    scores = history.last("rewards/score/std", 3)
    if not scores or any(point.value <= ALIKE for point in scores):  # reported by rewards_alike
        return None
    if any(point.value > ALIKE for point in recent):
        return None
    return f"The advantages do not vary, although the scores have a deviation of {number(mean(scores))}."


@symptom(
    "notice",
    *("rollouts/filtered_groups/fraction", "rollouts/filtered_easy/fraction", "rollouts/filtered_hard/fraction"),
    steps=5,
    why="Most of the generation goes to prompts that teach nothing.",
    advice="set data.curriculum, which chooses prompts by their earlier scores; or use data of another difficulty.",
)
def mostly_filtered(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return f"{number(100 * level)} % of the answered groups are filtered and replaced." if level > FILTERED else None


def _truncation(history: History, recent: list[Point]) -> tuple[bool, str] | None:
    """Return whether the truncated responses became more because responses grew, and a sentence about truncation."""
    key, length = "rollouts/truncated/fraction", "rollouts/response_tokens/mean"
    tokens, start = history.last(length, 5), history.first(length, 5)
    if not tokens:
        return None
    longer = mean(tokens) > LONGER * mean(start)
    rises = longer and mean(recent) > mean(history.first(key, 5)) + TRUNCATED_RISE
    if mean(recent) <= TRUNCATED and not rises:
        return None
    growth = f"; they grew from {number(mean(start))} to {number(mean(tokens))} tokens" if longer else ""
    return rises, f"{number(100 * mean(recent))} % of the responses are truncated{growth}."


@symptom(
    "warning",
    *("rollouts/truncated/fraction", "rollouts/response_tokens/mean", "rewards/score/mean"),
    steps=5,
    why="A truncated response has no answer to score.",
    advice="raise rollouts.max_new_tokens; set algorithm.overlong or a reward's truncated_score; check whether the "
    "samples repeat themselves.",
)
def much_truncated(history: History, recent: list[Point]) -> str | None:
    truncation = _truncation(history, recent)
    return None if truncation is None or truncation[0] else truncation[1]


@symptom(
    "warning",
    *("rollouts/truncated/fraction", "rollouts/response_tokens/mean", "rewards/score/mean"),
    steps=5,
    why="The responses grow until they are truncated, and then have no answer to score. The reward pays for length, or "
    "the policy never learns to end a response.",
    advice="raise rollouts.max_new_tokens; set algorithm.overlong or a reward's truncated_score; check whether the "
    "samples repeat themselves.",
)
def length_runs_away(history: History, recent: list[Point]) -> str | None:
    truncation = _truncation(history, recent)
    return truncation[1] if truncation is not None and truncation[0] else None


@symptom(
    "warning",
    *("rollouts/response_tokens/mean", "rewards/score/mean"),
    steps=5,
    why="Short responses score best: the reward or its penalties favour brevity, or the policy guesses instead of "
    "reasoning.",
    advice="read the samples; check the weight of length penalties in rewards, and algorithm.aggregation.",
)
def responses_shrink(history: History, recent: list[Point]) -> str | None:
    start = mean(history.first("rollouts/response_tokens/mean", 5))
    if start < WORTH_SHRINKING or mean(recent) >= SHRUNK * start:
        return None
    return f"Responses shrank from {number(start)} to {number(mean(recent))} tokens."


@symptom(
    "failure",
    *("eval/<set>/<metric>", "rewards/score/mean", "experience/kl_ref/mean"),
    why="The policy exploits a weakness of the reward instead of solving the task.",
    advice="read the samples with the highest scores; raise algorithm.kl.coef; fix the reward or add a verifier;",
)
def reward_hacking(history: History, _: list[Point]) -> Evidence | None:
    rise, fall = _score_rise(history), _held_out_fall(history)
    if rise is None or fall is None:
        return None
    meanwhile = f" while the training score rose from {number(rise[0])} to {number(rise[1])}"
    return _fall_evidence(fall, meanwhile, "rewards/score/mean", "experience/kl_ref/mean")


@symptom(
    "warning",
    *("eval/<set>/<metric>", "update/loss/mean"),
    why="The model loses earlier abilities: too many steps or too high a learning rate on this data.",
    advice="lower train.lr;",
)
def held_out_falls(history: History, _: list[Point]) -> Evidence | None:
    fall = _held_out_fall(history) if _score_rise(history) is None else None
    return None if fall is None else _fall_evidence(fall, "", "update/loss/mean")


@symptom(
    "warning",
    *("eval/<set>/<metric>", "update/loss/mean"),
    why="The model memorises the training rows: the model improves on these rows and gets worse on further rows.",
    advice="train for fewer epochs, lower train.lr, or use more data;",
)
def held_out_loss_rises(history: History, _: list[Point]) -> Evidence | None:
    for key, points in history.evals().items():
        if key.rpartition("/")[2] not in _LOSSES or len(points) < 3:
            continue
        lowest = min(points, key=lambda point: point.value)
        later = [point.value for point in points[-2:] if point.step > lowest.step]
        if len(later) == 2 and lowest.value > 0 and min(later) > OVERFIT * lowest.value:
            return Evidence(
                what=f"{key} was lowest at step {lowest.step} ({number(lowest.value)}) and is {number(later[-1])} now.",
                first_step=lowest.step,
                metrics=(key, "update/loss/mean"),
                advice=_keep(lowest),
            )
    return None


@symptom(
    "notice",
    *("eval/<set>/<metric>", "rewards/score/mean", "experience/kl_ref/mean"),
    why="Training does not change the held-out score: the policy hardly moves (see the KL), the reward measures "
    "something else, or there is nothing left to gain.",
    advice="if experience/kl_ref/mean is near 0, raise train.lr; compare rewards/score/mean; measure with the same "
    "reward and prompt format as in training.",
)
def held_out_flat(history: History, _: list[Point]) -> Evidence | None:
    for key, points in history.evals().items():
        values = [point.value for point in points]
        if not key.endswith("/score") or len(points) < FLAT_EVALS or points[-1].step - points[0].step < FLAT_STEPS:
            continue
        low, high = min(values), max(values)
        if high - low <= FLAT * max(map(abs, values)):
            return Evidence(
                what=f"{key} stayed between {number(low)} and {number(high)} over {len(points)} evaluations.",
                first_step=points[0].step,
                metrics=(key, "rewards/score/mean", "experience/kl_ref/mean"),
            )
    return None


@symptom(
    "warning",
    *("preference/accuracy/mean", "preference/margin/mean", "update/loss/mean"),
    steps=CHANCE_STEPS,
    why="The preferences teach nothing: the learning rate is too low, labels contradict each other, or chosen and "
    "rejected are swapped in part of the data.",
    advice="raise train.lr; read twenty pairs by hand; check the columns that data.columns names.",
)
def preferences_at_chance(history: History, recent: list[Point]) -> str | None:
    online = bool(history.first("rollouts/tokens/total"))  # new pairs in each step stay near chance for long
    if online or mean(recent) >= CHANCE:
        return None
    return f"Over {CHANCE_STEPS} steps {number(100 * mean(recent))} % of the pairs are ranked right; chance is 50 %."


def _keep(best: Point) -> str:
    if best.step == 0:
        return "begin again from the model before training, which was better."
    return f"keep the checkpoint of step {best.step} (train.best_metric, train.early_stopping)."


def _score_rise(history: History) -> tuple[float, float] | None:
    """Return the training score at the beginning and now. None: no rise beyond noise."""
    start, recent = history.first("rewards/score/mean", 5), history.last("rewards/score/mean", 5)
    spread = history.first("rewards/score/std", 5)
    if not recent or not spread or mean(recent) <= mean(start) + SCORE_RISE * mean(spread):
        return None
    return mean(start), mean(recent)


def _held_out_fall(history: History) -> tuple[str, Point, float] | None:
    """Return a metric far below the best value (higher is better), with the best evaluation and the present mean."""
    for key, points in history.evals().items():
        fallen = _fallen(points) if key.rpartition("/")[2] not in (*_LOSSES, *_NEUTRAL) else None
        if fallen is not None:
            return key, *fallen
    return None


def _fall_evidence(fall: tuple[str, Point, float], meanwhile: str, *metrics: str) -> Evidence:
    key, best, level = fall
    what = f"{key} fell from {number(best.value)} (step {best.step}) to {number(level)}{meanwhile}."
    return Evidence(what=what, first_step=best.step, metrics=(key, *metrics), advice=_keep(best))


def _fallen(points: list[Point]) -> tuple[Point, float] | None:
    """Return the best evaluation and the mean of the last two, if both lie far below the best."""
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
    """Return the standard deviation of a series around its trend, from second differences.

    Second differences are 0 for a straight line. The trend turns at the best point, whose difference is left out.
    """
    bends = [
        before.value - 2.0 * point.value + after.value
        for before, point, after in zip(points, points[1:], points[2:], strict=False)
        if point is not best
    ]
    return math.sqrt(fmean(bend * bend for bend in bends) / 6.0)
