"""Symptoms of the policy's learning: divergence, entropy, clipping, gradients, mismatch between sampler and trainer.

The thresholds are the same for all runs, and lie well outside the values of healthy runs.
"""

from __future__ import annotations

import math
from statistics import median

from rlhf.tracking.diagnosis.findings import Evidence, History, Point, mean, symptom
from rlhf.tracking.formatting import number

KL_REF = 1.0  # nats a token: the reference gives each sampled token e times less probability; useful runs stay below .3
KL_JUMP, KL_JUMP_FROM = 5.0, 0.2  # times the median of the 20 steps before: a drift is slower, whatever its level
KL_OLD = 0.2  # nats a token within one update: trust regions are set to .01-.05
ENTROPY_FLOOR = 0.02  # nats: of 50 tokens one is not the likeliest; samples of a group are copies
ENTROPY_SHARE = 0.05  # of the first entropy: 95 % of the exploration is gone
ENTROPY_GROWTH, ENTROPY_RISE = 2.0, 0.5  # times, and in nats: a learning policy gets surer; twice as unsure is noise
CLIP_HIGH = 0.35  # of the tokens: token-wise clipping holds some .1-.2; sequence-wise clipping up to a third
RATIO_STILL = 1.02  # largest ratio: with the usual clip at 1.2, no ratio comes near the clip
SPIKE, BURST, SPIKES = 10.0, 100.0, 3  # times the median gradient norm; single spikes are held by train.grad_clip
LOGPROB_DIFF = 0.1  # nats: bfloat16 gives .04 on average, float32 1e-6
LOGPROB_GROWTH, LOGPROB_GROWTH_FROM = 10.0, 0.01  # times the first values: kernels do not change, weights do
PROBE_GROWTH, PROBE_GROWTH_FROM = 5.0, 0.05  # the same for the probe's largest difference, a noisier value
ESS = 0.8  # share of the tokens: healthy runs stay above .95
REJECTED = 0.5  # half of the samples are thrown away

# these symptoms also appear in the models of a server's clients
_LEARNING_RATE = "train.lr of a run, learning_rate in the AdamParams of a Tinker client"
_LOSSES = (
    *("update/loss/mean", "update/policy_loss/mean", "update/value_loss/mean", "update/grad_norm"),
    *("update/critic_grad_norm", "update/kl_old/mean", "update/entropy/mean", "experience/kl_ref/mean"),
)


@symptom(
    "failure",
    *_LOSSES,
    why="There was an overflow or a division by zero. The learning rate may be too high, a reward may return "
    "infinities, or a half-precision computation may be out of its range.",
    advice=f"go back to the last checkpoint with a lower learning rate ({_LEARNING_RATE}); look for nan in the rewards "
    "of samples/; use bfloat16 instead of float16.",
)
def not_finite(history: History, _: list[Point]) -> Evidence | None:
    keys = tuple(key for key in _LOSSES if key in history.not_finite)
    what = f"{', '.join(keys)} was not a finite number at step {history.step}."
    return Evidence(what=what, metrics=keys) if keys else None


@symptom(
    "warning",
    *("experience/kl_ref/mean", "update/kl_old/mean", "rewards/score/mean"),
    steps=3,
    why=(
        "The policy no longer writes the text of the reference model. The reward then rates text of an unfamiliar "
        "kind, and the policy loses abilities of the reference model."
    ),
    advice="resume from a checkpoint before the rise with a lower train.lr or a higher algorithm.kl.coef; read the "
    "samples of these steps.",
)
def kl_blow_up(history: History, recent: list[Point]) -> Evidence | None:
    level = mean(recent)
    before = [point.value for point in history.last("experience/kl_ref/mean", 23)[:-3]]
    usual = median(before) if before else math.inf
    jumped = level > max(KL_JUMP * usual, KL_JUMP_FROM)  # an estimate may be 0 or negative
    if level <= KL_REF and not jumped:
        return None
    rise = f"; the median of the 20 steps before is {number(usual)}" if jumped else ""
    what = f"The KL to the reference is {number(level)} nats a token{rise}."
    return Evidence(what=what, severity="failure" if level > KL_REF else None)


@symptom(
    "warning",
    *("update/kl_old/mean", "update/clip_fraction/mean", "update/ratio/max"),
    steps=3,
    why=(
        "After such a large move the samples of the step no longer show how good the policy is, and the clipped "
        "objective does not bring the policy back."
    ),
    advice="lower train.lr, train.epochs_per_batch, or the number of updates a step (raise "
    "train.sequences_per_update).",
)
def update_too_large(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return f"One step's updates move the policy by {number(level)} nats a token." if level > KL_OLD else None


@symptom(
    "warning",
    *("update/entropy/mean", "advantages/zero_groups/fraction", "rewards/score/std"),
    steps=5,
    why=(
        "The policy gives nearly all probability to one continuation. The responses to a prompt are then alike and "
        "have equal scores, so there is no learning signal."
    ),
    advice="stop here if the held-out score is good; otherwise go back and raise algorithm.clip_high (.28), set "
    "algorithm.entropy.coef, lower train.lr, or sample at a rollouts.temperature of 1.",
)
def entropy_collapse(history: History, recent: list[Point]) -> str | None:
    level, start = mean(recent), mean(history.first("update/entropy/mean", 3))
    if level >= max(ENTROPY_FLOOR, ENTROPY_SHARE * start):
        return None
    return f"The policy's entropy is {number(level)} nats a token; it began at {number(start)}."


@symptom(
    "warning",
    *("update/entropy/mean", "experience/kl_ref/mean", "rollouts/response_tokens/mean"),
    steps=5,
    why="The policy spreads its probability over random tokens. Usually the updates push down the sampled tokens "
    "(negative advantages) faster than the updates push up further tokens, or an entropy bonus outweighs the reward.",
    advice="lower train.lr, lower algorithm.entropy.coef if the key is set, and raise algorithm.kl.coef.",
)
def entropy_explosion(history: History, recent: list[Point]) -> str | None:
    level, start = mean(recent), mean(history.first("update/entropy/mean", 3))
    if level <= max(ENTROPY_GROWTH * start, start + ENTROPY_RISE):
        return None
    return f"The policy's entropy rose from {number(start)} to {number(level)} nats a token."


@symptom(
    "warning",
    *("update/clip_fraction/mean", "update/kl_old/mean", "update/ratio/max"),
    steps=5,
    why="Clipped tokens give no gradient. The first updates of a step move the policy so far that later updates add "
    "little.",
    advice="lower train.lr or train.epochs_per_batch, or raise train.sequences_per_update.",
)
def clip_fraction_high(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return f"{number(100 * level)} % of the tokens are clipped." if level > CLIP_HIGH else None


@symptom(
    "notice",
    *("update/clip_fraction/mean", "update/ratio/max", "update/lr"),
    steps=20,
    why="The policy hardly moves within a step: the learning rate is much lower than the clip would allow.",
    advice="raise train.lr (by 3, then look again), if the score does not rise now.",
)
def clip_fraction_zero(history: History, recent: list[Point]) -> str | None:
    ratios, rates = history.last("update/ratio/max", 20), history.last("update/lr", 20)
    if not ratios or any(point.value > 0 for point in recent):
        return None
    largest = max(point.value for point in ratios)
    ending = bool(rates) and rates[-1].value < 0.5 * max(p.value for p in (*rates, *history.first("update/lr")))
    if not 1.0 < largest < RATIO_STILL or ending:  # at 1 there is one update a step, and nothing to clip
        return None
    return f"In 20 steps no token was clipped, and no ratio was above {number(largest)}."


@symptom(
    "warning",
    *("update/grad_norm", "update/loss/mean"),
    why="A few batches have a much larger gradient than all further batches. Their prompts or labels may be wrong, the "
    "learning rate may be near divergence, or a reward may have another scale than the rest.",
    advice=f"look at the samples of these steps; lower the learning rate ({_LEARNING_RATE}), clip the gradient "
    "(train.grad_clip, grad_clip_norm), and warm up longer (train.warmup_steps) if these steps come early.",
)
def gradient_spikes(history: History, _: list[Point]) -> Evidence | None:
    for key in ("update/grad_norm", "update/critic_grad_norm"):
        recent = history.last(key) or history.last(key, 20)
        typical = median(point.value for point in recent) if recent else 0.0
        if typical <= 0:
            continue
        spikes = [point for point in recent if point.value > SPIKE * typical]
        largest = max(recent, key=lambda point: point.value)
        if len(spikes) >= SPIKES or largest.value > BURST * typical:
            return Evidence(
                what=f"{key} was more than {number(SPIKE)} times its median ({number(typical)}) in {len(spikes)} of "
                f"{len(recent)} steps; the largest was {number(largest.value)}, at step {largest.step}.",
                first_step=spikes[0].step,
                last_step=spikes[-1].step,
                metrics=(key, "update/loss/mean"),
            )
    return None


@symptom(
    "warning",
    *("experience/rollout_logprob_diff/mean", "experience/rollout_logprob_diff/max", "experience/rollout_ess_token"),
    steps=3,
    why=(
        "The engine's probabilities differ from the trainer's, so the gradient is biased. The cause may be old "
        "weights, other numerics, or other sampling settings."
    ),
    advice="compare weight_sync/probe_max_diff; set algorithm.correction, which reduces the weight of tokens with a "
    "large difference, or removes them.",
)
def sampler_mismatch(history: History, recent: list[Point]) -> str | None:
    lag = history.newest("experience/policy_lag/max")
    if lag is not None and lag.value > 0:  # older weights differ by themselves; their effect shows in the ratios
        return None
    start = history.first("experience/rollout_logprob_diff/mean", 5)
    level, before = mean(recent), median(point.value for point in start)
    grown = len(start) == 5 and level > LOGPROB_GROWTH * before and level > LOGPROB_GROWTH_FROM
    if level <= LOGPROB_DIFF and not grown:
        return None
    return f"Sampler and trainer differ by {number(level)} nats a token; at the beginning it was {number(before)}."


@symptom(
    "warning",
    *("weight_sync/probe_max_diff", "experience/rollout_logprob_diff/mean"),
    steps=3,
    why="Engine and trainer give different log-probabilities to the same text, and the difference grows. Some weights "
    "do not reach the engine, or its precision cannot represent them.",
    advice="do not loosen the check; report the difference with the model's name and environment.json.",
)
def probe_drift(history: History, recent: list[Point]) -> str | None:
    start = history.first("weight_sync/probe_max_diff", 5)
    level, before = mean(recent), median(point.value for point in start)
    if len(start) < 5 or level <= PROBE_GROWTH_FROM or level <= PROBE_GROWTH * before:
        return None
    return f"The weight-sync probe differs by {number(level)} nats; at the beginning it was {number(before)}."


@symptom(
    "warning",
    *("experience/rollout_ess_token", "experience/rollout_ratio/max", "experience/policy_lag/max"),
    steps=3,
    why="A few tokens with large ratios of trainer to sampler would carry most of the weight. The policy that sampled "
    "the responses differs too much from the trained policy.",
    advice="compare weight_sync/probe_max_diff; set algorithm.correction with a truncation.",
)
def effective_samples_low(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return f"The effective sample size is {number(100 * level)} % of the tokens." if level < ESS else None


@symptom(
    "warning",
    *("experience/rollout_rejected/fraction", "experience/rollout_logprob_diff/mean"),
    steps=3,
    why="Sampler and trainer disagree more than the correction's bounds allow; most of the generation is wasted.",
    advice="find the cause of the difference first (weight_sync/probe_max_diff, train.lr); then widen the bounds "
    "of algorithm.correction.",
)
def much_rejected(_: History, recent: list[Point]) -> str | None:
    level = mean(recent)
    return (
        f"{number(100 * level)} % of the sampled tokens are rejected by the correction." if level > REJECTED else None
    )


@symptom(
    "warning",
    *("update/explained_variance", "update/value_loss/mean", "update/critic_grad_norm"),
    steps=10,
    why="The critic predicts the returns worse than their mean would, so the critic adds noise to every advantage.",
    advice="raise algorithm.critic_lr, set algorithm.critic_warmup_steps, or start the critic from the reward model.",
)
def critic_worse_than_none(_: History, recent: list[Point]) -> str | None:
    if any(point.value >= 0 for point in recent):
        return None
    return f"The explained variance was below 0 for 10 steps, {number(mean(recent))} on average."


@symptom(
    "warning",
    "update/lr",
    steps=3,
    why="The policy learns nothing: the schedule has ended, or the learning rate is 0.",
    advice=f"set a learning rate ({_LEARNING_RATE}), train.min_lr_ratio or train.lr_schedule.",
)
def learning_rate_zero(_: History, recent: list[Point]) -> str | None:
    return None if any(point.value != 0 for point in recent) else "The learning rate was 0 for three steps."
