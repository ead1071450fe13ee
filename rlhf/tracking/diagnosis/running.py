"""Symptoms of the run as a program: failing rewards, broken prefixes, grammars, throughput, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from rlhf.tracking.diagnosis.findings import HEAD, Evidence, History, Point, mean, symptom
from rlhf.tracking.formatting import number

RECENT = 20  # steps in which an error still counts as current
SLOWED = 0.5  # of the first steps' throughput: longer responses cost less
GROWTH, GROWTH_GIB = 1.5, 1.0  # both: a long-lived process keeps memory once allocated
STILL_GROWS = 1.02  # within the last 20 steps

BROKEN = 0.1  # of the calls: a sub-agent or a summary now and then is the agent's design
_BROKEN: Mapping[str, str] = {  # a remedy for each reason
    "edited_history": (
        "let the agent send the model's turns back unchanged; nothing is wrong if the agent shortens its history on "
        "purpose."
    ),
    "other_system_prompt": "keep the system prompt of a conversation, and put changing text into a later message.",
    "other_tools": "offer the same tools, in the same order, in each call of a conversation.",
    "rewritten_turn": (
        "set data.chat_template to a template that writes earlier turns exactly as the model did, with their reasoning."
    ),
    "open_turn": "let the conversations of a call end with a message of the user or of a tool.",
}
RESTRICTED = 0.1  # of the sampled tokens: an agent may ask for a form now and then
_FREE_FORM = "describe the form of the answer in the prompt, and let the reward judge the form."
_RESTRICTED: Mapping[str, str] = {  # a remedy for each field of a request
    "tool_choice": "let the agent ask with `tool_choice: auto`, so that the model decides whether and how to call.",
    "response_format": f"let the agent leave out response_format (text.format, output_config): {_FREE_FORM}",
    "structured_outputs": f"let the agent leave out structured_outputs: {_FREE_FORM}",
}
_FAILURES = {
    "rewards/errors/total": "reward calls raised, hung or returned no number",
    "rollouts/dropped_groups/total": "groups were replaced because a reward failed",
    "rollouts/environment_errors/total": "conversations ended with an error of their environment",
    "agents/errors/total": "sessions ended with a failure of their agent",
}


@symptom(
    "warning",
    *_FAILURES,
    why=(
        "A reward, an environment or an agent fails on some responses. Failed responses are not trained on, which "
        "biases training towards the remaining responses."
    ),
    advice=(
        "errors.jsonl names prompt, sample and message of each; fix the function, or raise reward_policy.timeout_s "
        "if the function is slow."
    ),
)
def rewards_fail(history: History, _: list[Point]) -> Evidence | None:
    recent = {key: history.since(key, history.step - RECENT) for key in _FAILURES}
    failed = {key: errors for key in _FAILURES if (errors := [point for point in recent[key] if point.value > 0])}
    if not failed:
        return None
    counts = [f"{number(sum(point.value for point in errors))} {_FAILURES[key]}" for key, errors in failed.items()]
    steps = [point.step for errors in failed.values() for point in errors]
    what = f"In the last steps {', and '.join(counts)}."
    return Evidence(what=what, first_step=min(steps), last_step=max(steps), metrics=tuple(failed))


@symptom(
    "notice",
    *("agents/broken_prefixes/fraction", "agents/inserted_tokens/mean", "agents/calls/mean"),
    steps=3,
    why="Such a call begins a new sequence. The engine and the trainer compute its whole prompt again.",
    advice="read the sessions marked as broken in samples/;",
)
def prefixes_break(history: History, recent: list[Point]) -> Evidence | None:
    if mean(recent) <= BROKEN:
        return None
    reason, share = _most_frequent(_BROKEN, "agents/broken_by", history, recent)
    what = f"{mean(recent):.0%} of the calls do not continue the session's tokens, most often for the reason "
    return Evidence(what=f"{what}`{reason.replace('_', ' ')}` ({share}).", advice=_BROKEN[reason])


@symptom(
    "warning",
    *("agents/restricted_tokens/fraction", "rollouts/response_tokens/mean"),
    steps=1,
    why="The agent asks for a grammar, which chooses in the place of the policy. Such tokens are not trained on.",
    advice="if the model should learn to write them,",
)
def grammars_restrict(history: History, recent: list[Point]) -> Evidence | None:
    if mean(recent) <= RESTRICTED:
        return None
    reason, share = _most_frequent(_RESTRICTED, "agents/restricted_by", history, recent)
    what = f"{mean(recent):.0%} of the step's sampled tokens are not trained on, most of them because of `{reason}`"
    return Evidence(what=f"{what} ({share}).", advice=_RESTRICTED[reason])


def _most_frequent(reasons: Iterable[str], metric: str, history: History, recent: Sequence[Point]) -> tuple[str, str]:
    """Return the most frequent reason of the recent steps, and the share as `2 of 3`."""
    points = {reason: history.since(f"{metric}_{reason}/total", recent[0].step - 1) for reason in reasons}
    counts = {reason: sum(point.value for point in of) for reason, of in points.items()}
    most = max(counts, key=lambda reason: counts[reason])
    return most, f"{number(counts[most])} of {number(sum(counts.values()))}"


@symptom(
    "notice",
    *("throughput/tokens_per_s", "time/step_s", "rollouts/response_tokens/max"),
    steps=2 * HEAD,
    why="Something else uses the machine, memory is short, or a few long responses delay each batch.",
    advice="see which of the time/ metrics grew; compare rollouts/response_tokens/max with the mean; "
    "rollouts.oversample does not wait for the slowest.",
)
def slower(history: History, recent: list[Point]) -> Evidence | None:
    start = history.first("throughput/tokens_per_s")[2:]  # the first steps warm up
    before, now = median(p.value for p in start), median(p.value for p in recent[-HEAD:])
    if now >= SLOWED * before:
        return None
    what = f"Throughput fell from {number(before)} to {number(now)} tokens a second."
    return Evidence(what=what, first_step=recent[-HEAD].step)


@symptom(
    "warning",
    "memory/<role>_rss_gib",
    why="A process does not free its memory. In the end the kernel kills the process, usually in the middle of a step.",
    advice="lower train.checkpoint_every, so that a kill costs little; if it is the reward's role, look for objects "
    "that its function keeps between calls.",
)
def memory_grows(history: History, _: list[Point]) -> Evidence | None:
    for key in history.metrics():
        start, recent = history.first(key), history.last(key, 2 * HEAD)
        if not key.startswith("memory/") or not key.endswith("_rss_gib") or len(start) < HEAD or not recent:
            continue
        before, now = start[-1].value, recent[-1].value
        if now > max(GROWTH * before, before + GROWTH_GIB) and now > STILL_GROWS * recent[0].value:
            what = f"{key} grew from {number(before)} to {number(now)} GiB, and still grows."
            return Evidence(what=what, first_step=start[-1].step, metrics=(key,))
    return None
