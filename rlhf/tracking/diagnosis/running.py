"""Checks of the run as a program: failing rewards and environments, throughput, memory.

Each check is pure: it takes a history and returns a finding or None.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from rlhf.tracking.diagnosis.findings import HEAD, Finding, History, say

RECENT = 20  # steps in which an error still counts as current
SLOWED = 0.5  # of the first steps' throughput: longer responses cost less
GROWTH, GROWTH_GIB = 1.5, 1.0  # both: a long-lived process keeps memory that it has once allocated
STILL_GROWS = 1.02  # within the last 20 steps

_FAILURES = {
    "rewards/errors/total": "reward calls raised, hung or gave no number",
    "rollouts/dropped_groups/total": "groups were replaced since a reward failed",
    "rollouts/environment_errors/total": "conversations ended with an error of their environment",
}


def rewards_fail(history: History) -> Finding | None:
    failures: list[str] = []
    keys: list[str] = []
    steps: list[int] = []
    for key, meaning in _FAILURES.items():
        failed = [point for point in history.since(key, history.step - RECENT) if point.value > 0]
        if failed:
            failures.append(f"{say(sum(point.value for point in failed))} {meaning}")
            keys.append(key)
            steps += [point.step for point in failed]
    if not failures:
        return None
    return Finding(
        kind="rewards_fail",
        severity="warning",
        first_step=min(steps),
        last_step=max(steps),
        metrics=tuple(keys),
        what=f"In the last steps {', and '.join(failures)}.",
        why="A reward or an environment fails on some responses. Failed responses are not trained on, which "
        "biases training towards the others.",
        advice="errors.jsonl names prompt, sample and message of each; fix the function, or raise "
        "reward_policy.timeout_s where it is slow.",
    )


def slower(history: History) -> Finding | None:
    key = "throughput/tokens_per_s"
    recent, start = history.last(key, 2 * HEAD), history.first(key)[2:]  # the first steps warm up
    if not recent or not start:
        return None
    before, now = median(p.value for p in start), median(p.value for p in recent[-HEAD:])
    if now >= SLOWED * before:
        return None
    return Finding(
        kind="slower",
        severity="notice",
        first_step=recent[-HEAD].step,
        last_step=history.step,
        metrics=(key, "time/step_s", "rollouts/response_tokens/max"),
        what=f"Throughput fell from {say(before)} to {say(now)} tokens a second.",
        why="Something else uses the machine, memory is short, or a few long responses hold up each batch.",
        advice="see which of the time/ metrics grew; compare rollouts/response_tokens/max with the mean; "
        "rollouts.oversample does not wait for the slowest.",
    )


def memory_grows(history: History) -> Finding | None:
    for key in [key for key in history.metrics() if key.startswith("memory/") and key.endswith("_rss_gib")]:
        start, recent = history.first(key), history.last(key, 2 * HEAD)
        if len(start) < HEAD or not recent:
            continue
        before, now = start[-1].value, recent[-1].value
        if now > max(GROWTH * before, before + GROWTH_GIB) and now > STILL_GROWS * recent[0].value:
            return Finding(
                kind="memory_grows",
                severity="warning",
                first_step=start[-1].step,
                last_step=history.step,
                metrics=(key,),
                what=f"{key} grew from {say(before)} to {say(now)} GiB, and still grows.",
                why="A process does not free its memory. In the end the kernel ends it, most often in the "
                "middle of a step.",
                advice="lower train.checkpoint_every, so that a kill costs little; if it is the reward's role, look "
                "for objects that its function keeps between calls.",
            )
    return None


RUNNING: tuple[Callable[[History], Finding | None], ...] = (rewards_fail, slower, memory_grows)
