"""Checks of the policy's learning: divergence, entropy, clipping, gradients, mismatch between sampler and trainer.

Each check is pure: it takes a history and returns a finding or None. The thresholds are the same for all runs, and lie
well outside the values of healthy runs. The tests hold rows of some healthy runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from rlhf.tracking.diagnosis.findings import Finding, History, mean, say

KL_REF = 1.0  # nats a token: the reference gives each sampled token e times less probability; useful runs stay below .3
KL_JUMP, KL_JUMP_FROM = 5.0, 0.2  # times the median of the 20 steps before: a drift is slower, whatever its level
KL_OLD = 0.2  # nats a token within one update: trust regions are set to .01-.05
ENTROPY_FLOOR = 0.02  # nats: of 50 tokens one is not the likeliest; samples of a group are copies
ENTROPY_SHARE = 0.05  # of its beginning: 95 % of the exploration is gone
ENTROPY_GROWTH, ENTROPY_RISE = 2.0, 0.5  # both: a policy that learns gets surer; twice as unsure is noise
CLIP_HIGH = 0.35  # of the tokens: token-wise clipping holds some .1-.2; sequence-wise clipping up to a third
RATIO_STILL = 1.02  # largest ratio: with the usual clip at 1.2, nothing ever comes near it
SPIKE, BURST, SPIKES = 10.0, 100.0, 3  # times the median gradient norm; single spikes are held by train.grad_clip
LOGPROB_DIFF = 0.1  # nats: bfloat16 gives .04 on average, float32 1e-6
LOGPROB_GROWTH, LOGPROB_GROWTH_FROM = 10.0, 0.01  # times its beginning: kernels do not change, weights do
PROBE_GROWTH, PROBE_GROWTH_FROM = 5.0, 0.05  # the same for the probe's largest difference, which is noisier
ESS = 0.8  # share of the tokens: healthy runs stay above .95
REJECTED = 0.5  # half of the samples are thrown away

_LOSSES = (
    *("update/loss/mean", "update/policy_loss/mean", "update/value_loss/mean", "update/grad_norm"),
    *("update/critic_grad_norm", "update/kl_old/mean", "update/entropy/mean", "experience/kl_ref/mean"),
)


def not_finite(history: History) -> Finding | None:
    keys = tuple(key for key in _LOSSES if key in history.not_finite)
    if not keys:
        return None
    return Finding(
        kind="not_finite",
        severity="failure",
        first_step=history.step,
        last_step=history.step,
        metrics=keys,
        what=f"{', '.join(keys)} was not a finite number at step {history.step}.",
        why="An overflow or a division by zero: a learning rate that is too high, a reward that returns infinities, or "
        "a half-precision computation out of its range.",
        advice="go back to the last checkpoint with a lower train.lr; look for nan in the rewards of samples/; take "
        "bfloat16 for float16.",
    )


def kl_blow_up(history: History) -> Finding | None:
    key = "experience/kl_ref/mean"
    recent = history.last(key, 3)
    if not recent:
        return None
    level = mean(recent)
    before = [point.value for point in history.last(key, 23)[:-3]]
    usual = median(before) if before else math.inf
    jumped = level > max(KL_JUMP * usual, KL_JUMP_FROM)  # an estimate may be 0 or below it
    if level <= KL_REF and not jumped:
        return None
    grown = f"; the median of the 20 steps before is {say(usual)}" if jumped else ""
    return Finding(
        kind="kl_blow_up",
        severity="failure" if level > KL_REF else "warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "update/kl_old/mean", "rewards/score/mean"),
        what=f"The KL to the reference is {say(level)} nats a token{grown}.",
        why="The policy has left the text that the reference model writes. A reward then rates text that it was never "
        "made for, and what the model could do before is being lost.",
        advice="resume from a checkpoint before the rise with a lower train.lr or a higher algorithm.kl.coef; read the "
        "samples of these steps.",
    )


def update_too_large(history: History) -> Finding | None:
    key = "update/kl_old/mean"
    recent = history.last(key, 3)
    if not recent or mean(recent) <= KL_OLD:
        return None
    return Finding(
        kind="update_too_large",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "update/clip_fraction/mean", "update/ratio/max"),
        what=f"One step's updates move the policy by {say(mean(recent))} nats a token.",
        why="After so large a move the samples of the step no longer say how good the policy is, and the clipped "
        "objective does not pull it back.",
        advice="lower train.lr, train.epochs_per_batch, or the number of updates a step (raise "
        "train.sequences_per_update).",
    )


def entropy_collapse(history: History) -> Finding | None:
    key = "update/entropy/mean"
    recent, start = history.last(key, 5), history.first(key, 3)
    if not recent or not (mean(recent) < ENTROPY_FLOOR or mean(recent) < ENTROPY_SHARE * mean(start)):
        return None
    return Finding(
        kind="entropy_collapse",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "advantages/zero_groups/fraction", "rewards/score/std"),
        what=f"The policy's entropy is {say(mean(recent))} nats a token; it began at {say(mean(start))}.",
        why="The policy gives nearly all probability to one continuation. Responses to a prompt are then alike, their "
        "scores too, and nothing is left to learn from.",
        advice="stop here if the held-out score is good; otherwise go back and raise algorithm.clip_high (.28), set "
        "algorithm.entropy.coef, lower train.lr, or sample at a rollouts.temperature of 1.",
    )


def entropy_explosion(history: History) -> Finding | None:
    key = "update/entropy/mean"
    recent, start = history.last(key, 5), history.first(key, 3)
    if not recent or mean(recent) <= max(ENTROPY_GROWTH * mean(start), mean(start) + ENTROPY_RISE):
        return None
    return Finding(
        kind="entropy_explosion",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "experience/kl_ref/mean", "rollouts/response_tokens/mean"),
        what=f"The policy's entropy rose from {say(mean(start))} to {say(mean(recent))} nats a token.",
        why="The policy spreads over tokens at random: most often updates push down the sampled tokens (negative "
        "advantages) faster than anything is pushed up, or an entropy bonus outweighs the reward.",
        advice="lower train.lr, lower algorithm.entropy.coef if it is set, and raise algorithm.kl.coef.",
    )


def clip_fraction_high(history: History) -> Finding | None:
    key = "update/clip_fraction/mean"
    recent = history.last(key, 5)
    if not recent or mean(recent) <= CLIP_HIGH:
        return None
    return Finding(
        kind="clip_fraction_high",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "update/kl_old/mean", "update/ratio/max"),
        what=f"{say(100 * mean(recent))} % of the tokens are clipped.",
        why="Clipped tokens give no gradient: the first updates of a step go so far that later ones say little.",
        advice="lower train.lr or train.epochs_per_batch, or raise train.sequences_per_update.",
    )


def clip_fraction_zero(history: History) -> Finding | None:
    key = "update/clip_fraction/mean"
    recent, ratios = history.last(key, 20), history.last("update/ratio/max", 20)
    if not recent or not ratios or any(point.value > 0 for point in recent):
        return None
    largest = max(point.value for point in ratios)
    rates = history.last("update/lr", 20)
    ending = bool(rates) and rates[-1].value < 0.5 * max(p.value for p in (*rates, *history.first("update/lr")))
    if not 1.0 < largest < RATIO_STILL or ending:  # at 1 there is one update a step, and nothing to clip
        return None
    return Finding(
        kind="clip_fraction_zero",
        severity="notice",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "update/ratio/max", "update/lr"),
        what=f"In 20 steps no token was clipped, and no ratio was above {say(largest)}.",
        why="The policy hardly moves within a step: the learning rate is far below what the clip would allow.",
        advice="raise train.lr (by 3, then look again), if the score does not rise as it is.",
    )


def gradient_spikes(history: History) -> Finding | None:
    for key in ("update/grad_norm", "update/critic_grad_norm"):
        recent = history.last(key) or history.last(key, 20)
        typical = median(point.value for point in recent) if recent else 0.0
        if typical <= 0:
            continue
        spikes = [point for point in recent if point.value > SPIKE * typical]
        largest = max(recent, key=lambda point: point.value)
        if len(spikes) < SPIKES and largest.value <= BURST * typical:
            continue
        return Finding(
            kind="gradient_spikes",
            severity="warning",
            first_step=spikes[0].step,
            last_step=spikes[-1].step,
            metrics=(key, "update/loss/mean"),
            what=f"{key} was more than {say(SPIKE)} times its median ({say(typical)}) in {len(spikes)} of "
            f"{len(recent)} steps; the largest was {say(largest.value)}, at step {largest.step}.",
            why="Single batches pull far harder than the others: rare prompts or labels that are wrong, a learning "
            "rate at the edge of divergence, or a reward on another scale than the rest.",
            advice="look at the samples of these steps; lower train.lr, set or lower train.grad_clip, and lengthen "
            "train.warmup_steps if they come early.",
        )
    return None


def sampler_mismatch(history: History) -> Finding | None:
    key = "experience/rollout_logprob_diff/mean"
    recent, start = history.last(key, 3), history.first(key, 5)
    if not recent:
        return None
    level, began = mean(recent), median(point.value for point in start)
    grown = len(start) == 5 and level > LOGPROB_GROWTH * began and level > LOGPROB_GROWTH_FROM
    if level <= LOGPROB_DIFF and not grown:
        return None
    return Finding(
        kind="sampler_mismatch",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "experience/rollout_logprob_diff/max", "experience/rollout_ess_token"),
        what=f"Sampler and trainer differ by {say(level)} nats a token; at the beginning it was {say(began)}.",
        why="The engine's probabilities differ from the trainer's, so the gradient "
        "is not that of the sampling policy: old weights, other numerics, or other sampling "
        "settings.",
        advice="compare weight_sync/probe_max_diff; set algorithm.correction, which weighs or leaves out what is far "
        "off.",
    )


def probe_drift(history: History) -> Finding | None:
    key = "weight_sync/probe_max_diff"
    recent, start = history.last(key, 3), history.first(key, 5)
    if not recent or len(start) < 5:
        return None
    level, began = mean(recent), median(point.value for point in start)
    if level <= PROBE_GROWTH_FROM or level <= PROBE_GROWTH * began:
        return None
    return Finding(
        kind="probe_drift",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "experience/rollout_logprob_diff/mean"),
        what=f"The weight-sync probe differs by {say(level)} nats; at the beginning it was {say(began)}.",
        why="Engine and trainer give other log-probabilities to the same text, more so from step to step: some part "
        "of the weights does not reach the engine, or its precision does not hold them.",
        advice="do not lower the check; report it with the model's name and environment.json.",
    )


def effective_samples_low(history: History) -> Finding | None:
    key = "experience/rollout_ess_token"
    recent = history.last(key, 3)
    if not recent or mean(recent) >= ESS:
        return None
    return Finding(
        kind="effective_samples_low",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "experience/rollout_ratio/max", "experience/policy_lag/max"),
        what=f"The effective sample size is {say(100 * mean(recent))} % of the tokens.",
        why="Few tokens with large ratios of trainer to sampler would carry most of the weight: the responses are of a "
        "policy that is too different from the one that is trained.",
        advice="compare weight_sync/probe_max_diff; set algorithm.correction with a truncation.",
    )


def much_rejected(history: History) -> Finding | None:
    key = "experience/rollout_rejected/fraction"
    recent = history.last(key, 3)
    if not recent or mean(recent) <= REJECTED:
        return None
    return Finding(
        kind="much_rejected",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "experience/rollout_logprob_diff/mean"),
        what=f"{say(100 * mean(recent))} % of the sampled tokens are rejected by the correction.",
        why="Sampler and trainer disagree more than the correction's bounds allow; most of the generation is wasted.",
        advice="find the cause of the difference first (weight_sync/probe_max_diff, train.lr); then widen the bounds "
        "of algorithm.correction.",
    )


def critic_worse_than_none(history: History) -> Finding | None:
    key = "update/explained_variance"
    recent = history.last(key, 10)
    if not recent or any(point.value >= 0 for point in recent):
        return None
    return Finding(
        kind="critic_worse_than_none",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key, "update/value_loss/mean", "update/critic_grad_norm"),
        what=f"The explained variance was below 0 for 10 steps, {say(mean(recent))} on average.",
        why="The critic foresees the returns worse than their mean would: it adds noise to every advantage.",
        advice="raise algorithm.critic_lr, set algorithm.critic_warmup_steps, or start the critic from the reward "
        "model.",
    )


def learning_rate_zero(history: History) -> Finding | None:
    key = "update/lr"
    recent = history.last(key, 3)
    if not recent or any(point.value != 0 for point in recent):
        return None
    return Finding(
        kind="learning_rate_zero",
        severity="warning",
        first_step=recent[0].step,
        last_step=history.step,
        metrics=(key,),
        what="The learning rate was 0 for three steps.",
        why="Nothing is learnt: the schedule has ended, or train.lr is 0.",
        advice="set train.lr, train.min_lr_ratio or train.lr_schedule.",
    )


LEARNING: tuple[Callable[[History], Finding | None], ...] = (
    not_finite,
    kl_blow_up,
    update_too_large,
    entropy_collapse,
    entropy_explosion,
    clip_fraction_high,
    clip_fraction_zero,
    gradient_spikes,
    sampler_mismatch,
    probe_drift,
    effective_samples_low,
    much_rejected,
    critic_worse_than_none,
    learning_rate_zero,
)
