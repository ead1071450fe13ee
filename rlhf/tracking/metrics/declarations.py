"""Every metric, declared once: its name, unit, meaning and reduction, and the runs that record it.

`python -m rlhf.tracking.metrics.declarations > docs/metrics.md` writes the page from this table. An undeclared key
cannot be merged or logged. This module knows no values and no back end.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf.tracking.metrics.reductions import (
    CalibrationError,
    DifferenceOfMeans,
    EffectiveShare,
    ExplainedVariance,
    Histogram,
    Last,
    Max,
    Mean,
    Min,
    Reduction,
    Std,
    Sum,
)

Trait = Literal[
    "online",
    "advantages",
    "rewards",
    "teacher",
    "sft",
    "distillation",
    "preference",
    "steps",
    "reference",
    "critic",
    "groups",
    "correction",
    "environment",
    "eval",
    "gpu",
]

TRAITS: Mapping[Trait, str] = {
    "online": "responses are sampled during the run (PPO, GRPO, online DPO, ...)",
    "advantages": "the sampled tokens are weighed by advantages (PPO, GRPO, ...)",
    "rewards": "responses are scored",
    "teacher": "a teacher scores the sampled responses (on-policy distillation)",
    "sft": "supervised training on given responses, by their tokens or a teacher's distributions",
    "distillation": "training towards a teacher's distributions",
    "preference": "training on pairs of responses (reward models, DPO, ...)",
    "steps": "training on labelled steps of responses (process reward models)",
    "reference": "there is a reference model",
    "critic": "there is a critic",
    "groups": "the responses to one prompt are compared (GRPO, online DPO, ...)",
    "correction": "`algorithm.correction` is set",
    "environment": "the policy converses with an environment (`rollouts.environment`)",
    "eval": "there is an evaluation set",
    "gpu": "the role has a GPU",
}

PLACEHOLDERS: Mapping[str, tuple[str, str]] = {
    "name": (r"[A-Za-z0-9_.-]+", "a reward's name in the config"),
    "set": (r"[A-Za-z0-9_.-]+", "an evaluation set's name"),
    "metric": (r"[A-Za-z0-9_.@-]+", "`score`, a reward's name, `loss`, `kl_teacher`, or what the evaluation calls it"),
    "node": (r"[A-Za-z0-9_.-]+", "a node's address in the Ray cluster"),
    "role": ("policy|reference|teacher|reward|critic|rollout|controller", "a role, or `controller` for the driver"),
    "stage": (
        "data|rollouts|rewards|reference|teacher|values|old_logprobs|experience|advantages|update|weight_sync|probe"
        "|snapshot|checkpoint|eval",
        "`data`, `rollouts`, `rewards`, `reference`, `teacher`, `values`, `old_logprobs`, `experience`, `advantages`, "
        "`update`, `weight_sync`, `probe`, `snapshot`, `checkpoint` or `eval`",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The declaration of one metric. `name` may hold placeholders (`rewards/<name>/mean`)."""

    name: str
    unit: str  # "1" for pure numbers
    meaning: str
    reduction: type[Reduction] | None  # None: the reduction of the evaluated metric
    traits: frozenset[Trait]  # a run has the metric if all of these are true of it
    always: bool  # False: only with a setting named in `meaning`, even if the traits hold

    @property
    def pattern(self) -> str:
        """Return a regular expression of the metric's keys, for programs in any language."""
        return re.sub(r"<(\w+)>", lambda m: f"(?:{PLACEHOLDERS[m[1]][0]})", self.name)

    def matches(self, key: str) -> bool:
        """Return whether the key is this metric, with placeholders filled in."""
        return re.fullmatch(self.pattern, key) is not None


def _metric(
    name: str, unit: str, reduction: type[Reduction] | None, traits: str, meaning: str, *, always: bool = True
) -> Metric:
    known: dict[str, Trait] = {trait: trait for trait in TRAITS}
    words = frozenset(known[word] for word in traits.split())
    return Metric(name=name, unit=unit, meaning=meaning, reduction=reduction, traits=words, always=always)


_DECLARATIONS = (
    _metric(
        "data/epoch", "epochs", Last, "", "Passes over the training data so far; of several sets, over the last row's"
    ),
    _metric(
        "data/passed_over/total",
        "prompts",
        Sum,
        "online",
        "Prompts that came up and were measured as too easy or too hard to be asked again (`data.curriculum`)",
        always=False,
    ),
    _metric(
        "data/within_band/fraction",
        "1",
        Mean,
        "online",
        "Measured prompts that are neither too easy nor too hard (`data.curriculum`)",
        always=False,
    ),
    # rollouts
    _metric("rollouts/response_tokens/mean", "tokens", Mean, "online", "Sampled tokens of a response"),
    _metric("rollouts/response_tokens/max", "tokens", Max, "online", "Longest response"),
    _metric("rollouts/response_tokens/histogram", "tokens", Histogram, "online", "Sampled tokens of a response"),
    _metric("rollouts/prompt_tokens/mean", "tokens", Mean, "online", "Length of a prompt"),
    _metric(
        "rollouts/truncated/fraction",
        "1",
        Mean,
        "online",
        "Responses cut at `rollouts.max_new_tokens`, or conversations at a limit of `rollouts.environment`",
    ),
    _metric(
        "rollouts/tokens/total",
        "tokens",
        Sum,
        "online",
        "All tokens of the step's sequences, of groups that were left out too",
    ),
    _metric("rollouts/logprob/mean", "nats", Mean, "online", "Log-probability of a sampled token, by the sampler"),
    _metric(
        "rollouts/dropped_groups/total",
        "groups",
        Sum,
        "online",
        "Groups replaced by another prompt's since a reward failed (`on_error: drop`)",
    ),
    _metric("rollouts/turns/mean", "turns", Mean, "online environment", "Turns of the policy in a conversation"),
    _metric("rollouts/turns/max", "turns", Max, "online environment", "Most turns of a conversation"),
    _metric(
        "rollouts/environment_tokens/mean",
        "tokens",
        Mean,
        "online environment",
        "Tokens between the turns of a conversation: the environment's, and what the chat template writes around them",
    ),
    _metric(
        "rollouts/environment_errors/total",
        "errors",
        Sum,
        "online environment",
        "Conversations whose environment raised, hung, died or gave no number",
    ),
    _metric(
        "rollouts/environment_timeouts/total",
        "errors",
        Sum,
        "online environment",
        "Those of them that took longer than `rollouts.environment.step_timeout_s`",
    ),
    _metric(
        "rollouts/filtered_groups/fraction",
        "1",
        Mean,
        "online",
        "Answered groups that teach nothing and were replaced (`rollouts.dynamic_sampling`)",
        always=False,
    ),
    _metric(
        "rollouts/filtered_easy/fraction",
        "1",
        Mean,
        "online",
        "Those of them that score above the mean of the groups trained on; with scores of 0 and 1, the all-solved",
        always=False,
    ),
    _metric(
        "rollouts/filtered_hard/fraction",
        "1",
        Mean,
        "online",
        "The others; with scores of 0 and 1, the all-failed",
        always=False,
    ),
    _metric(
        "rollouts/cancelled_groups/total",
        "groups",
        Sum,
        "online",
        "Groups that were begun and not waited for (`rollouts.oversample`); their tokens are not counted anywhere",
        always=False,
    ),
    # rewards
    _metric("rewards/score/mean", "1", Mean, "online rewards", "Weighted sum of the rewards of a response"),
    _metric("rewards/score/std", "1", Std, "online rewards", "Its deviation over the step's responses"),
    _metric(
        "rewards/answered_score/mean",
        "1",
        Mean,
        "online rewards",
        "`rewards/score/mean` over all answered groups, filtered ones too (`rollouts.dynamic_sampling`)",
        always=False,
    ),
    _metric("rewards/<name>/mean", "1", Mean, "online rewards", "One reward, before its gate and weight"),
    _metric(
        "rewards/<name>/steps/mean",
        "steps",
        Mean,
        "online rewards",
        "Steps of a response, of a reward that is credited by them (`credit: step`)",
        always=False,
    ),
    _metric(
        "rewards/<name>/step/mean",
        "1",
        Mean,
        "online rewards",
        "What such a reward gives one step, before its gate and weight; `rewards/<name>/mean` has a response's sum",
        always=False,
    ),
    _metric(
        "rewards/<name>/step/std", "1", Std, "online rewards", "Its deviation over the batch's steps", always=False
    ),
    _metric(
        "rewards/greedy/mean",
        "1",
        Mean,
        "online advantages",
        "Score of the greedy response to a prompt, the baseline of remax",
        always=False,
    ),
    _metric("rewards/errors/total", "errors", Sum, "online", "Reward calls that raised, hung or gave no number"),
    _metric(
        "rewards/<name>/failures/total",
        "errors",
        Sum,
        "online rewards",
        "Failures of one reward, even if `on_error` gave the response a score; absent without failures",
        always=False,
    ),
    _metric(
        "rewards/<name>/no_opinion/fraction",
        "1",
        Mean,
        "online rewards",
        "Fraction of responses without a score from an applicable reward (it returned None)",
        always=False,
    ),
    # experience
    _metric(
        "experience/kl_ref/mean",
        "nats",
        Mean,
        "online reference",
        "KL(policy || reference) per sampled token, by the configured estimator",
    ),
    _metric(
        "experience/kl_teacher/mean",
        "nats",
        Mean,
        "online teacher",
        "KL(policy || teacher) per sampled token, estimated by old_logprobs - teacher_logprobs; of the step's first "
        "minibatch alone where the divergence is over the whole vocabulary",
    ),
    _metric("experience/kl_coef", "1", Last, "online advantages reference", "Coefficient of that KL in this step"),
    _metric(
        "experience/kl_rollout/mean",
        "nats",
        Mean,
        "online",
        "KL(sampler || trainer) per sampled token, estimated by k1 = rollout_logprobs - old_logprobs",
    ),
    _metric("experience/kl_rollout_k3/mean", "nats", Mean, "online", "The same by k3: never negative, less noisy"),
    _metric(
        "experience/rollout_logprob_diff/mean",
        "nats",
        Mean,
        "online",
        "|old_logprobs - rollout_logprobs|: how far sampler and trainer disagree about a token",
    ),
    _metric("experience/rollout_logprob_diff/max", "nats", Max, "online", "The largest such difference"),
    _metric("experience/rollout_ratio/mean", "1", Mean, "online", "exp(old_logprobs - rollout_logprobs) of a token"),
    _metric("experience/rollout_ratio/max", "1", Max, "online", "The largest"),
    _metric("experience/rollout_ratio/min", "1", Min, "online", "The smallest"),
    _metric(
        "experience/rollout_chi2_token",
        "1",
        Mean,
        "online",
        "Chi-square divergence of trainer from sampler per token: the mean squared ratio less 1",
    ),
    _metric(
        "experience/rollout_chi2_sequence",
        "1",
        Mean,
        "online",
        "The same of responses, by the products of their ratios",
    ),
    _metric(
        "experience/rollout_ess_token",
        "1",
        EffectiveShare,
        "online",
        "Effective sample size if tokens were weighed by their ratios, as a share of the tokens",
    ),
    _metric(
        "experience/rollout_ess_sequence",
        "1",
        EffectiveShare,
        "online",
        "The same of responses, by the products of their ratios",
    ),
    _metric(
        "experience/rollout_weight/mean",
        "1",
        Mean,
        "online correction",
        "Factor of the correction on a token's policy loss; 0 if the token is masked or rejected",
    ),
    _metric(
        "experience/rollout_weight_ess",
        "1",
        EffectiveShare,
        "online correction",
        "Effective sample size under these weights, as a share of the tokens",
    ),
    _metric(
        "experience/rollout_weight_truncated/fraction",
        "1",
        Mean,
        "online correction",
        "Tokens whose weight was held at a bound",
    ),
    _metric(
        "experience/rollout_weight_masked/fraction",
        "1",
        Mean,
        "online correction",
        "Tokens whose weight is 0 because the ratio is out of bounds",
    ),
    _metric(
        "experience/rollout_rejected/fraction",
        "1",
        Mean,
        "online correction",
        "Tokens that `reject` or `off_policy_mask` left out",
    ),
    _metric("experience/policy_lag/max", "versions", Max, "online", "Age of the oldest weights that sampled a token"),
    _metric(
        "experience/values/mean", "1", Mean, "online critic", "Critic's value of a token's state, before the update"
    ),
    _metric("experience/returns/mean", "1", Mean, "online critic", "Critic's target"),
    # advantages
    _metric("advantages/mean", "1", Mean, "online advantages", "Advantage of a sampled token, before whitening"),
    _metric("advantages/std", "1", Std, "online advantages", "Its deviation, before whitening"),
    _metric(
        "advantages/histogram",
        "1",
        Histogram,
        "online advantages",
        "Advantage of a sampled token, as its loss is weighed by it: whitened, held",
    ),
    _metric(
        "advantages/zero_groups/fraction",
        "1",
        Mean,
        "online groups",
        "Prompts whose responses all have an advantage of 0, as a rule since they scored the same: they teach nothing",
    ),
    _metric(
        "advantages/overlong_penalty/mean",
        "1",
        Mean,
        "online groups",
        "What long responses lost of their scores (`algorithm.overlong`)",
        always=False,
    ),
    _metric(
        "advantages/clipped/fraction",
        "1",
        Mean,
        "online advantages",
        "Sampled tokens whose advantage was held (`algorithm.advantage_clip`)",
        always=False,
    ),
    _metric(
        "advantages/kept/fraction",
        "1",
        Mean,
        "online advantages",
        "Responses that are trained on, where some are left out (`rollouts.keep_per_prompt`, raft, `mask_truncated`)",
        always=False,
    ),
    # update
    _metric("update/loss/mean", "1", Mean, "", "The loss that is differentiated, all terms"),
    _metric("update/policy_loss/mean", "1", Mean, "online advantages", "Policy term of the loss"),
    _metric(
        "update/kl_loss/mean", "nats", Mean, "online advantages reference", "KL term (`kl.place: loss`)", always=False
    ),
    _metric("update/value_loss/mean", "1", Mean, "online critic", "Critic's loss"),
    _metric(
        "update/clip_fraction/mean",
        "1",
        Mean,
        "online advantages",
        "Sampled tokens where the clipped objective applies",
    ),
    _metric(
        "update/dual_clip_fraction/mean",
        "1",
        Mean,
        "online advantages",
        "Tokens at the dual clip, if one is set",
        always=False,
    ),
    _metric(
        "update/selected/fraction",
        "1",
        Mean,
        "online advantages",
        "Tokens that clip_cov takes the gradient from, or that kl_cov penalises",
        always=False,
    ),
    _metric(
        "update/entropy_coef",
        "1",
        Last,
        "online advantages",
        "Weight of the entropy bonus in this step (`algorithm.entropy.adaptive`)",
        always=False,
    ),
    _metric(
        "update/value_clip_fraction/mean",
        "1",
        Mean,
        "online critic",
        "Values at their clip, if one is set",
        always=False,
    ),
    _metric(
        "update/kl_old/mean",
        "nats",
        Mean,
        "online advantages",
        "KL from old_logprobs (the weights at the start of the update, or a bypassing correction's sampler), per token",
    ),
    _metric("update/ratio/max", "1", Max, "online advantages", "Largest exp(logprobs - old_logprobs)"),
    _metric(
        "update/ratio/histogram",
        "1",
        Histogram,
        "online advantages",
        "The algorithm's importance ratio of a sampled token, in all updates of the step",
    ),
    _metric(
        "update/entropy/mean", "nats", Mean, "online advantages", "Entropy of the policy's next-token distribution"
    ),
    _metric("update/token_accuracy/mean", "1", Mean, "sft", "Tokens in the loss mask with the highest probability"),
    _metric(
        "update/divergence/mean",
        "nats",
        Mean,
        "distillation",
        "Divergence from the teacher at a token in the loss mask",
    ),
    _metric("update/nll/mean", "nats", Mean, "distillation", "Negative log-probability of a token in the loss mask"),
    _metric(
        "update/step_accuracy/mean",
        "1",
        Mean,
        "steps",
        "Response steps whose label and score have the same sign",
    ),
    _metric("update/tokens/total", "tokens", Sum, "", "Tokens passed forward and backward, all epochs"),
    _metric("update/grad_norm", "1", Mean, "", "Norm of the gradient before clipping, mean over optimizer steps"),
    _metric("update/lr", "1", Last, "", "Learning rate of the last optimizer step"),
    _metric("update/critic_grad_norm", "1", Mean, "online critic", "The same for the critic"),
    _metric("update/critic_lr", "1", Last, "online critic", "The same for the critic"),
    _metric(
        "update/explained_variance",
        "1",
        ExplainedVariance,
        "online critic",
        "Fraction of the returns' variance predicted by the critic: 1 is perfect, 0 or less is no better than the mean",
    ),
    # preference
    _metric("preference/accuracy/mean", "1", Mean, "preference", "Pairs whose chosen response is preferred"),
    _metric(
        "preference/margin/mean",
        "1",
        DifferenceOfMeans,
        "preference",
        "Mean (implicit) reward of chosen, or desirable, responses less that of the others",
    ),
    _metric(
        "preference/calibration_error",
        "1",
        CalibrationError,
        "preference",
        "Reward models: mean gap, over bins, of accuracy and the confidence sigmoid(|margin|)",
        always=False,
    ),
    _metric("preference/chosen_reward/mean", "1", Mean, "preference", "(Implicit) reward of a chosen response"),
    _metric("preference/rejected_reward/mean", "1", Mean, "preference", "(Implicit) reward of a rejected response"),
    _metric(
        "preference/pairs/total",
        "pairs",
        Sum,
        "online preference",
        "Pairs that the step trained on: one of each prompt whose responses did not all score alike",
    ),
    _metric(
        "preference/on_policy_weight/mean",
        "1",
        Mean,
        "preference",
        "Factor on a pair's loss: the product of its responses' weights (`algorithm.wpo`)",
        always=False,
    ),
    _metric(
        "preference/mismatched_kl",
        "nats",
        Last,
        "preference",
        "KTO's estimate of the divergence from the reference, summed over a response",
        always=False,
    ),
    # evaluation
    _metric("eval/<set>/<metric>", "1", None, "eval", "A value on a held-out set, before training at step 0"),
    # weight sync
    _metric("weight_sync/version", "version", Last, "online", "Version of the weights that the engines now hold"),
    _metric(
        "weight_sync/probe_max_diff",
        "nats",
        Max,
        "online",
        "Largest |logprob| difference of engine and trainer on the probe after a sync",
    ),
    # time, throughput, memory
    _metric("time/step_s", "s", Sum, "", "Wall time of the step, without evaluation and checkpoint"),
    _metric("time/<stage>_s", "s", Sum, "", "Wall time of one stage; stages may overlap"),
    _metric("throughput/tokens_per_s", "tokens/s", Last, "", "Tokens of the step's batch over `time/step_s`"),
    _metric(
        "throughput/rollout_tokens_per_s",
        "tokens/s",
        Last,
        "online",
        "Sampled tokens, of groups that were left out too, over `time/rollouts_s`",
    ),
    _metric("throughput/train_tokens_per_s", "tokens/s", Last, "", "`update/tokens/total` over `time/update_s`"),
    _metric(
        "throughput/mfu",
        "1",
        Last,
        "",
        "The policy's flops in the update, divided by the measured matrix-product flops of its ranks",
    ),
    _metric("memory/<role>_rss_gib", "GiB", Max, "", "Resident memory of the role's largest process"),
    _metric("memory/<role>_gpu_gib", "GiB", Max, "gpu", "Peak GPU memory of the role's largest process"),
    # nodes, with all their processes
    _metric("system/<node>/cpu_fraction", "1", Mean, "", "Busy share of a node's cores since the last step"),
    _metric("system/<node>/memory_gib", "GiB", Last, "", "Memory of a node that is in use, at the end of the step"),
    _metric("system/<node>/gpu_fraction", "1", Mean, "gpu", "Busy share of a node's GPUs since the last step"),
    _metric("system/<node>/gpu_memory_gib", "GiB", Max, "gpu", "Memory of a node's GPUs in use, the most of the step"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _DECLARATIONS}


def declared(key: str) -> Metric:
    """Return the declaration of a key. A literal name precedes a pattern. KeyError: the key is not declared."""
    if key in METRICS:
        return METRICS[key]
    for metric in METRICS.values():
        if "<" in metric.name and metric.matches(key):
            return metric
    raise KeyError(f"metric {key!r} is not declared in rlhf/tracking/metrics/declarations.py")


def is_declared(key: str) -> bool:
    """Return whether a key is declared. A key of a run of another version may not be."""
    return key in METRICS or any("<" in metric.name and metric.matches(key) for metric in METRICS.values())


def merge(parts: Iterable[Mapping[str, Reduction]]) -> dict[str, Reduction]:
    """Merge the values of all parts in the given order (ranks, then micro-batches).

    KeyError: a key is not declared. TypeError: the reduction differs from the declared one.
    """
    merged: dict[str, Reduction] = {}
    for part in parts:
        for key, value in part.items():
            wanted = declared(key).reduction
            if wanted is not None and type(value) is not wanted:
                raise TypeError(f"metric {key!r} reduces by {wanted.__name__}, got {type(value).__name__}")
            merged[key] = merged[key].merge(value) if key in merged else value
    return merged


def results(merged: Mapping[str, Reduction]) -> dict[str, float]:
    """Return the numbers to log."""
    return {key: value.result() for key, value in merged.items() if not isinstance(value, Histogram)}


def histograms(merged: Mapping[str, Reduction]) -> dict[str, Histogram]:
    """Return the histograms to log. Empty ones are left out."""
    return {key: value for key, value in merged.items() if isinstance(value, Histogram) and any(value.counts)}


def expected(traits: Iterable[Trait]) -> list[str]:
    """Return the names (with their placeholders) of all numbers that every run with these traits has."""
    have = frozenset(traits)
    numbers = [metric for metric in METRICS.values() if metric.reduction is not Histogram]
    return [metric.name for metric in numbers if metric.always and metric.traits <= have]


def markdown() -> str:
    """Return the text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m rlhf.tracking.metrics.declarations > docs/metrics.md`.",
        "Change the declarations, not this page.",
        "",
        "Each line of `metrics.jsonl` is one step: `step`, `time_s` (seconds of running since the run first started,",
        "without the time between a stop and its resume), then the metrics below. Steps count from 1; step 0 is the",
        "evaluation before training. Numbers that are not finite are `null`. W&B shows the same keys over `step`.",
        "",
        "*Reduction* is how the values of ranks, micro-batches and optimizer steps become one number: `Mean`",
        "divides the sum by the count over all of them (never a mean of means), `Std` is the population deviation,",
        "`Last` the newest value. A `Histogram` stands in `histograms.jsonl` ([its form](tracking.md#histograms)), not",
        "here. *In runs with* names the requirements of a run for the metric:",
        "",
        *(f"- **{trait}**: {meaning}." for trait, meaning in TRAITS.items()),
        "",
        "Placeholders:",
        "",
        *(f"- `<{name}>`: {meaning}." for name, (_, meaning) in PLACEHOLDERS.items()),
    ]
    stage = ""
    for metric in METRICS.values():
        if metric.name.split("/")[0] != stage:
            stage = metric.name.split("/")[0]
            lines += [
                "",
                f"## {stage}",
                "",
                "| metric | unit | reduction | in runs with | meaning |",
                "|---|---|---|---|---|",
            ]
        traits = ", ".join(trait for trait in TRAITS if trait in metric.traits) or "(all)"
        meaning = metric.meaning.replace("|", "\\|")
        reduction = metric.reduction.__name__ if metric.reduction else ""
        lines.append(f"| `{metric.name}` | {metric.unit} | {reduction} | {traits} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
