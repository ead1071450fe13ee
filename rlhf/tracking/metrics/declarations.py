"""Every metric, declared once: name, unit, meaning and reduction, and the runs with the metric.

`python -m rlhf.tracking.metrics.declarations > docs/metrics.md` writes the page from this table. An undeclared key
cannot be merged or logged. This module knows no values and no back end.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlhf.role_table import ROLES
from rlhf.tracking.metrics import reductions
from rlhf.tracking.metrics.reductions import Histogram, Reduction

_REDUCTIONS: Mapping[str, type[Reduction]] = {
    kind.__name__: kind for kind in vars(reductions).values() if isinstance(kind, type) and issubclass(kind, Reduction)
}

TRAITS: Mapping[str, str] = {
    "online": "responses are sampled during the run (PPO, GRPO, online DPO, ...)",
    "advantages": "the sampled tokens are weighed by advantages (PPO, GRPO, ...)",
    "rewards": "responses are scored",
    "sft": "supervised training on given responses, by their tokens or a teacher's distributions",
    "distillation": "training towards a teacher's distributions",
    "preference": "training on pairs of responses (reward models, DPO, ...)",
    "steps": "training on labelled steps of responses (process reward models)",
    "groups": "the responses to one prompt are compared (GRPO, online DPO, ...)",
    "teachers": "`teacher` names several teachers",
    "correction": "`algorithm.correction` is set",
    "taught": "a teacher, or the policy itself with a privileged prompt, values each sampled token",
    "self_taught": "the policy with a privileged prompt is the teacher (opsd, sdft, sdpo, rlsd)",
    "environment": "the policy converses with an environment (`rollouts.environment`)",
    "agent": "an agent calls the policy (`rollouts.agent`)",
    "eval": "there is an evaluation set",
    "gpu": "the role has a GPU",
    **{role: entry.metrics_of for role, entry in ROLES.items() if entry.metrics_of},
}

_STAGES = (
    "data|rollouts|rewards|reference|teacher|values|old_logprobs|experience|advantages|"
    "update|weight_sync|probe|snapshot|checkpoint|eval|prompt_values"
)
PLACEHOLDERS: Mapping[str, tuple[str, str]] = {
    "name": (r"[A-Za-z0-9_.-]+", "a reward's name in the config"),
    "teacher": (r"[A-Za-z0-9_./-]+", "a teacher's name in the config"),
    "criterion": (r"[A-Za-z][A-Za-z0-9_-]*", "the name of a criterion in `judge.rubric`"),
    "set": (r"[A-Za-z0-9_.-]+", "an evaluation set's name"),
    "metric": (r"[A-Za-z0-9_.@/-]+", "`score`, a reward's name, `loss`, `kl_teacher`, or what the evaluation calls it"),
    "lag": (r"[0-9]+", "a number of versions"),
    "number": (r"[A-Za-z0-9_.-]+", "a name chosen in your own loop"),
    "reason": (
        r"[a-z_]+",
        "why a prompt does not continue the session: `edited_history`, `other_tools`, `rewritten_turn` or another",
    ),
    "node": (r"[A-Za-z0-9_.-]+", "a node's address in the Ray cluster"),
    "role": ("|".join(("controller", *ROLES)), "a role, or `controller` for the driver"),
    "stage": (_STAGES, " or ".join(f"`{_STAGES}`".replace("|", "`, `").rsplit(", ", 1))),
}


# name | unit | reduction | traits of the runs with the metric | meaning. An indented line continues the line before.
# "1" is the unit of pure numbers. An `optional` metric also needs the setting named in the meaning.
_TABLE = """\
data/epoch | epochs | Last | all | Passes over the training data so far; with several sets, passes over the set of the
    last row
data/passed_over/total | prompts | Sum | online optional | Prompts that were skipped because they were measured as too
    easy or too hard (`data.curriculum`)
data/within_band/fraction | 1 | Mean | online optional | Fraction of the measured prompts that are neither too easy nor
    too hard (`data.curriculum`)

rollouts/response_tokens/mean | tokens | Mean | online | Sampled tokens of a response
rollouts/response_tokens/max | tokens | Max | online | Sampled tokens of the longest response
rollouts/response_tokens/histogram | tokens | Histogram | online | Sampled tokens of each response
rollouts/prompt_tokens/mean | tokens | Mean | online | Length of a prompt
rollouts/truncated/fraction | 1 | Mean | online | Fraction of the responses truncated at `rollouts.max_new_tokens` or at
    the limit of their row, or of the conversations truncated at a limit of `rollouts.environment`
rollouts/tokens/total | tokens | Sum | online | All tokens of the step's sequences, including those of
    groups that are not trained on
rollouts/logprob/mean | nats | Mean | online | Log-probability of a sampled token, by the sampler
rollouts/dropped_groups/total | groups | Sum | online | Groups replaced by those of another prompt because a reward
    failed (`on_error: drop`)
rollouts/turns/mean | turns | Mean | online environment | Turns of the policy in a conversation
rollouts/turns/max | turns | Max | online environment | Most turns of a conversation
rollouts/environment_tokens/mean | tokens | Mean | online environment | Tokens between the turns of a conversation: from
    the environment, and from the chat template
rollouts/environment_errors/total | errors | Sum | online environment | Conversations whose environment raised, hung,
    died or returned no number
rollouts/environment_timeouts/total | errors | Sum | online environment | Conversations whose environment took longer
    than `rollouts.environment.step_timeout_s`
rollouts/filtered_groups/fraction | 1 | Mean | online optional | Fraction of the answered groups that have no learning
    signal and were replaced (`rollouts.dynamic_sampling`)
rollouts/filtered_easy/fraction | 1 | Mean | online optional | Fraction of the answered groups that were filtered and
    score above the mean of the trained groups; with scores of 0 and 1, all their responses are right
rollouts/filtered_hard/fraction | 1 | Mean | online optional | Fraction of the answered groups that were filtered and
    score at most the mean of the trained groups; with scores of 0 and 1, all their responses are wrong
rollouts/cancelled_groups/total | groups | Sum | online optional | Groups that were cancelled before they were finished
    (`rollouts.oversample`); their tokens are counted only if `rollouts.carry_over` keeps the tokens until they are
    trained
rollouts/carried/fraction | 1 | Mean | online optional | Fraction of the trained groups whose responses were begun for a
    cancelled request (`rollouts.carry_over`)
rollouts/reasked_groups/total | groups | Sum | online optional | Groups that were requested again, because training them
    would exceed `rollouts.max_staleness` (`weight_updates: in_flight`), or 16 versions (`rollouts.carry_over`)
rollouts/in_flight/mean | groups | Mean | online optional | Groups that are requested and not yet answered, averaged
    over the step's time (`weight_updates: in_flight`)
rollouts/engines | engines | Last | online optional | Engines that answer at the end of the step
    (`cluster.roles.rollout.engines` with min and max)
rollouts/completion_bias | 1 | Last | online optional | Mean number of response tokens of the trained groups, divided by
    the mean of all groups answered so far (`batch_order: completion`); below 1, short responses are trained first

agents/calls/mean | calls | Mean | online agent | Calls of the model in a session
agents/calls/max | calls | Max | online agent | Most calls of a session
agents/broken_prefixes/fraction | 1 | Mean | online agent | Fraction of the calls whose prompt has an earlier answer of
    the model but does not continue the session's tokens, because the agent has changed its history
agents/broken_by_<reason>/total | calls | Sum | online agent optional | Calls whose prompt does not continue the
    session's tokens for one reason
agents/restricted_tokens/fraction | 1 | Mean | online agent | Fraction of the sampled tokens that are not trained on,
    because a grammar restricted these tokens
agents/restricted_by_<reason>/total | tokens | Sum | online agent optional | Sampled tokens that a grammar restricted
    for one reason: a `tool_choice` that forces a call, a `response_format`, or `structured_outputs`
agents/inserted_tokens/mean | tokens | Mean | online agent | Tokens of a session after its first prompt that were not
    sampled: results of tools, further prompts, and the chat template
agents/errors/total | errors | Sum | online agent | Sessions whose agent raised, hung, died, exceeded a limit or
    returned no valid result
agents/timeouts/total | errors | Sum | online agent | Sessions that took longer than `rollouts.agent.timeout_s`
rewards/score/mean | 1 | Mean | online rewards | Weighted sum of the rewards of a response
rewards/score/std | 1 | Std | online rewards | Standard deviation of the score over the step's responses
rewards/answered_score/mean | 1 | Mean | online rewards optional | `rewards/score/mean` over all answered groups,
    filtered ones too (`rollouts.dynamic_sampling`)
rewards/<name>/mean | 1 | Mean | online rewards | One reward, before its gate and weight
rewards/<name>/steps/mean | steps | Mean | online rewards optional | Steps of a response, for a reward with `credit:
    step`
rewards/<name>/step/mean | 1 | Mean | online rewards optional | Reward of one step before its gate and weight (`credit:
    step`); `rewards/<name>/mean` has a response's sum
rewards/<name>/step/std | 1 | Std | online rewards optional | Standard deviation of that reward over the batch's steps
rewards/greedy/mean | 1 | Mean | online advantages optional | Score of the greedy response to a prompt, which is the
    baseline of remax
rewards/errors/total | errors | Sum | online | Reward calls that raised, hung or returned no number
rewards/<name>/failures/total | errors | Sum | online rewards optional | Failures of one reward, even if `on_error` gave
    the response a score; absent without failures
rewards/<name>/no_opinion/fraction | 1 | Mean | online rewards optional | Fraction of responses without a score from an
    applicable reward (it returned None)
rewards/<name>/agreement/mean | 1 | Mean | online rewards optional | Agreement of repeated judgements (`judge.samples`):
    1 minus the mean distance of two judgements of a criterion, from 0 to 1
rewards/<name>/disagreement/mean | 1 | Mean | online rewards optional | Standard deviation of the score over the
    reward models of an ensemble (`reward.members`)
rewards/<name>/criterion/<criterion>/mean | 1 | Mean | online rewards optional | A criterion of a rubric, from 0 to 1

experience/kl_ref/mean | nats | Mean | online reference | KL(policy || reference) per sampled token, by the configured
    estimator
experience/privileged/fraction | 1 | Mean | online self_taught | Fraction of the responses that have a privileged prompt
experience/kl_teacher/mean | nats | Mean | online taught | KL(policy || teacher) per sampled token, estimated by
    old_logprobs - teacher_logprobs; only over the step's first minibatch if the divergence covers the whole vocabulary;
    per span of text, of both models' tokens, if the teacher has another tokenizer
experience/kl_by_teacher/<teacher>/mean | nats | Mean | online teacher teachers optional | The same over the responses
    of one teacher's rows; absent in a step without such rows
experience/kl_coef | 1 | Last | online advantages reference | Coefficient of the KL to the reference in this step
experience/kl_rollout/mean | nats | Mean | online | KL(sampler || trainer) per sampled token, estimated by k1 =
    rollout_logprobs - old_logprobs
experience/kl_rollout_k3/mean | nats | Mean | online | The same KL estimated by k3: never negative, less noisy
experience/rollout_logprob_diff/mean | nats | Mean | online | |old_logprobs - rollout_logprobs|: how much sampler and
    trainer disagree about a token
experience/rollout_logprob_diff/max | nats | Max | online | Largest |old_logprobs - rollout_logprobs| of a token
experience/rollout_ratio/mean | 1 | Mean | online | exp(old_logprobs - rollout_logprobs) of a token
experience/rollout_ratio/max | 1 | Max | online | Largest exp(old_logprobs - rollout_logprobs)
experience/rollout_ratio/min | 1 | Min | online | Smallest exp(old_logprobs - rollout_logprobs)
experience/rollout_chi2_token | 1 | Mean | online | Chi-square divergence of trainer from sampler per token: the mean
    squared ratio less 1
experience/rollout_chi2_sequence | 1 | Mean | online | Chi-square divergence per response, from the product of its
    tokens' ratios
experience/rollout_ess_token | 1 | EffectiveShare | online | Effective sample size if tokens were weighted by their
    ratios, as a fraction of the tokens
experience/rollout_ess_token/lag_<lag> | 1 | EffectiveShare | online | The same over the tokens sampled by weights that
    were `<lag>` versions older than the trained weights
experience/rollout_ess_sequence | 1 | EffectiveShare | online | Effective sample size if responses were weighted by the
    products of their ratios, as a fraction of the responses
experience/rollout_weight/mean | 1 | Mean | online correction | Factor of the correction on a token's policy loss; 0 if
    the token is masked or rejected
experience/rollout_weight_ess | 1 | EffectiveShare | online correction | Effective sample size under the correction's
    weights, as a fraction of the tokens
experience/rollout_weight_truncated/fraction | 1 | Mean | online correction | Fraction of the tokens whose weight was
    truncated at a bound
experience/rollout_weight_masked/fraction | 1 | Mean | online correction | Fraction of the tokens whose weight is 0
    because the ratio is out of bounds
experience/rollout_rejected/fraction | 1 | Mean | online correction | Fraction of the tokens rejected by `reject` or
    `off_policy_mask`
experience/policy_lag/max | versions | Max | online | Age of the oldest weights that sampled a token
experience/policy_lag/mean | versions | Mean | online | Mean over responses of the age of the oldest weights that
    sampled one of their tokens
experience/policy_lag/histogram | versions | Histogram | online | Age of the oldest weights that sampled a token of each
    response
experience/values/mean | 1 | Mean | online critic | Critic's value of a token's state, before the update
experience/returns/mean | 1 | Mean | online critic | Critic's target

advantages/mean | 1 | Mean | online advantages | Advantage of a sampled token, before whitening
advantages/std | 1 | Std | online advantages | Standard deviation of the advantages, before whitening
advantages/histogram | 1 | Histogram | online advantages | Advantage of a sampled token as its loss uses it: whitened
    and clipped
advantages/zero_groups/fraction | 1 | Mean | online groups | Fraction of the prompts whose responses all have an
    advantage of 0, usually because all scores are equal: such prompts have no learning signal
advantages/prompt_value/mean | 1 | Mean | online advantages optional | Value of the prompts before training (a_star_po)
advantages/length_penalty/mean | 1 | Mean | online advantages optional | Score that responses lose by their length
    (`algorithm.length_penalty`, `algorithm.overlong`)
advantages/clipped/fraction | 1 | Mean | online advantages optional | Fraction of the sampled tokens whose advantage was
    clipped (`algorithm.advantage_clip`)
advantages/kept/fraction | 1 | Mean | online advantages optional | Fraction of the responses that are trained on, if
    some are left out (`rollouts.keep_per_prompt`, raft, `mask_truncated`)

update/loss/mean | 1 | Mean | all | The differentiated loss with all its terms
update/policy_loss/mean | 1 | Mean | online advantages | Policy term of the loss
update/kl_loss/mean | nats | Mean | online advantages reference optional | KL term (`kl.place: loss`)
update/given_loss/mean | 1 | Mean | online advantages optional | Loss of a trained token of the given responses (chord),
    before it is multiplied by `update/given_share`; `update/loss/mean` is the loss of the rollouts
update/given_nll/mean | nats | Mean | online optional | Cross-entropy of a trained token of the given responses
update/given_share | 1 | Last | online optional | Share of the given responses in the loss (`algorithm.mu`, or 1 -
    `algorithm.on_policy_share`)
update/imitation_loss/mean | nats | Mean | online advantages optional | Negative log-probability of the tokens of right
    responses (`algorithm.imitation`)
update/value_loss/mean | 1 | Mean | online critic | Critic's loss
update/clip_fraction/mean | 1 | Mean | online advantages | Fraction of the sampled tokens where the clip limits the
    objective
update/dual_clip_fraction/mean | 1 | Mean | online advantages optional | Fraction of the tokens at the dual clip, if the
    algorithm has a dual clip
update/selected/fraction | 1 | Mean | online advantages optional | Fraction of the tokens whose gradient clip_cov
    removes, or which kl_cov penalises
update/entropy_coef | 1 | Last | online advantages optional | Weight of the entropy bonus in this step
    (`algorithm.entropy.adaptive`)
update/value_clip_fraction/mean | 1 | Mean | online critic optional | Fraction of the values at the value clip, if there
    is a value clip
update/kl_old/mean | nats | Mean | online advantages | KL from old_logprobs per token (from the weights at the start of
    the update, or the sampler of a bypassing correction)
update/ratio/max | 1 | Max | online advantages | Largest exp(logprobs - old_logprobs)
update/ratio/histogram | 1 | Histogram | online advantages | The algorithm's importance ratio of a sampled token, in all
    updates of the step
update/entropy/mean | nats | Mean | online advantages | Entropy of the policy's next-token distribution
update/token_accuracy/mean | 1 | Mean | sft | Fraction of the tokens in the loss mask that have the highest probability
update/divergence/mean | nats | Mean | distillation | Divergence from the teacher at a token in the loss mask
update/divergence_by_teacher/<teacher>/mean | nats | Mean | distillation teachers optional | Divergence from one teacher
    at a token of its rows; absent in a step without such rows
update/compared/fraction | 1 | Mean | all optional | Fraction of the trained tokens that are compared with the teacher,
    if a teacher has another tokenizer: the tokens in a span of text that both tokenizers write with whole tokens
update/compared_by_teacher/<teacher>/fraction | 1 | Mean | teachers optional | The same over the tokens of one teacher's
    rows
update/nll/mean | nats | Mean | distillation | Negative log-probability of a token in the loss mask
update/step_accuracy/mean | 1 | Mean | steps | Fraction of the response steps whose label and score have the same sign
update/tokens/total | tokens | Sum | all | Tokens passed forward and backward, all epochs
update/without_tokens/total | steps | Sum | online advantages optional | Optimizer steps that were left out, because no
    token of their responses is trained on (`agents/restricted_tokens/fraction`)
update/grad_norm | 1 | Mean | all | Norm of the gradient before clipping, mean over optimizer steps
update/router_load | 1 | ExpertLoad | all optional | Load of the busiest expert divided by the mean load, mean over
    layers of a mixture of experts; no token is dropped (for mixtures as `policy.model`)
update/router_entropy | 1 | ExpertEntropy | all optional | Entropy of the experts' load divided by its maximum, mean
    over layers: 1 is even (for mixtures as `policy.model`)
update/router_balance_loss | 1 | Mean | all optional | Balance loss of a sequence before its coefficient: 1 is even
    (`policy.router_balance_coef`)
update/image_effect | nats | Last | all optional | Mean |difference| of the log-probabilities of a row's text with its
    own and with other images, at a start. Near 0 the run ends
update/lr | 1 | Last | all | Learning rate of the last optimizer step
update/critic_grad_norm | 1 | Mean | online critic | Norm of the critic's gradient before clipping, mean over optimizer
    steps
update/critic_router_load | 1 | ExpertLoad | online critic optional | As `update/router_load` (for mixtures as
    `critic.model`)
update/critic_router_entropy | 1 | ExpertEntropy | online critic optional | As `update/router_entropy` (for mixtures as
    `critic.model`)
update/critic_router_balance_loss | 1 | Mean | online critic optional | As `update/router_balance_loss`
    (`critic.router_balance_coef`)
update/critic_lr | 1 | Last | online critic | Learning rate of the critic's last optimizer step
update/explained_variance | 1 | ExplainedVariance | online critic | Fraction of the returns' variance predicted by the
    critic: 1 is perfect, 0 or less is no better than the mean

preference/accuracy/mean | 1 | Mean | preference | Fraction of the pairs whose chosen response has the higher reward
preference/margin/mean | 1 | DifferenceOfMeans | preference | Mean (implicit) reward of chosen, or desirable, responses
    minus that of the other responses
preference/calibration_error | 1 | CalibrationError | preference optional | Reward models: mean gap, over bins, of
    accuracy and the confidence sigmoid(|margin|)
preference/chosen_reward/mean | 1 | Mean | preference | (Implicit) reward of a chosen response
preference/rejected_reward/mean | 1 | Mean | preference | (Implicit) reward of a rejected response
preference/pairs/total | pairs | Sum | online preference | Number of trained pairs: one for each prompt whose responses
    have different scores
preference/on_policy_weight/mean | 1 | Mean | preference optional | Factor on a pair's loss: the product of its
    responses' weights (`algorithm.wpo`)
preference/mismatched_kl | nats | Last | preference optional | KTO's estimate of the divergence from the reference,
    summed over a response

eval/<set>/<metric> | 1 | - | eval | A value on a held-out set, before training at step 0

own/<number> | 1 | Last | online optional | A number recorded by your own loop (`loop.record` of `rlhf.start`)

weight_sync/version | version | Last | online | Version of the weights that the engines hold now
weight_sync/probe_max_diff | nats | Max | online | Largest |logprob| difference of engine and trainer on the probe after
    a sync
weight_sync/image_effect_policy | nats | Last | online optional | Mean |difference| of the log-probabilities of the
    probe's text with its own and with other images in the policy, at the first sync of a start. Near 0 the run ends
weight_sync/image_effect_engine | nats | Last | online optional | The same in the engine with the smallest difference

time/engines_idle/fraction | 1 | Last | online | Fraction of the step's time in which the engines answered no training
    prompt
time/trainer_waits_s | s | Sum | online | Time in which training waited for responses
time/recovery_s | s | Sum | all | Time spent on starting lost workers again
time/step_s | s | Sum | all | Wall time of the step, without evaluation and checkpoint
time/<stage>_s | s | Sum | all | Wall time of one stage; stages may overlap

throughput/tokens_per_s | tokens/s | Last | all | Tokens of the step's batch over `time/step_s`
throughput/rollout_tokens_per_s | tokens/s | Last | online | Sampled tokens, including those of groups that
    are not trained on, over `time/rollouts_s`
throughput/train_tokens_per_s | tokens/s | Last | all | `update/tokens/total` over `time/update_s`; as the next metric,
    absent in a step that does not train the policy
throughput/mfu | 1 | Last | all | The policy's flops in the update, divided by the measured matrix-product flops of its
    ranks

recovery/<role>/total | workers | Sum | all | Lost workers of the role that were started again; the ranks of a gang
    count once

memory/<role>_rss_gib | GiB | Max | all | Resident memory of the role's largest process
memory/<role>_gpu_gib | GiB | Max | gpu | Peak GPU memory of the role's largest process

system/<node>/cpu_fraction | 1 | Mean | all | Busy fraction of a node's cores since the last step
system/<node>/memory_gib | GiB | Last | all | Used memory of a node at the end of the step
system/<node>/gpu_fraction | 1 | Mean | gpu | Busy fraction of a node's GPUs since the last step
system/<node>/gpu_memory_gib | GiB | Max | gpu | Largest used memory of a node's GPUs during the step
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """The declaration of one metric. `name` may hold placeholders (`rewards/<name>/mean`)."""

    name: str
    unit: str
    meaning: str
    reduction: type[Reduction] | None  # None: the reduction of the evaluated metric (`-` in the table)
    traits: frozenset[str]  # a run has the metric if all these traits are true of the run
    always: bool  # False: only with a setting named in `meaning`, even if the traits hold

    @property
    def pattern(self) -> str:
        """Return a regular expression of the metric's keys, for programs in any language."""
        return re.sub(r"<(\w+)>", lambda m: f"(?:{PLACEHOLDERS[m[1]][0]})", self.name)

    def placeholders(self, key: str) -> dict[str, str] | None:
        """Return the values of the placeholders in a key. None: the key is not this metric."""
        match = re.fullmatch(re.sub(r"<(\w+)>", lambda m: f"(?P<{m[1]}>{PLACEHOLDERS[m[1]][0]})", self.name), key)
        return None if match is None else match.groupdict()


def _parse(line: str) -> Metric:
    name, unit, reduction, words, meaning = line.split(" | ", maxsplit=4)
    traits = frozenset(words.split()) - {"all", "optional"}
    if unknown := traits - TRAITS.keys():
        raise ValueError(f"metric {name!r} has the unknown trait {min(unknown)!r}")
    return Metric(
        name=name,
        unit=unit,
        meaning=meaning,
        reduction=None if reduction == "-" else _REDUCTIONS[reduction],
        traits=traits,
        always="optional" not in words.split(),
    )


_DECLARATIONS = [_parse(line) for line in _TABLE.replace("\n    ", " ").splitlines() if line]
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _DECLARATIONS}


def _find(key: str) -> Metric | None:
    patterns = (metric for metric in METRICS.values() if "<" in metric.name and metric.placeholders(key))
    return METRICS.get(key) or next(patterns, None)


def declared(key: str) -> Metric:
    """Return the declaration of a key. A literal name precedes a pattern. KeyError: the key is not declared."""
    metric = _find(key)
    if metric is None:
        raise KeyError(f"metric {key!r} is not declared in rlhf/tracking/metrics/declarations.py")
    return metric


def is_declared(key: str) -> bool:
    """Return whether a key is declared. A key of a run of another version may not be."""
    return _find(key) is not None


def merge_metrics(parts: Iterable[Mapping[str, Reduction]]) -> dict[str, Reduction]:
    """Merge the parts in order (ranks, micro-batches). KeyError: an undeclared key. TypeError: another reduction."""
    merged: dict[str, Reduction] = {}
    for part in parts:
        for key, value in part.items():
            wanted = declared(key).reduction
            if wanted is not None and type(value) is not wanted:
                raise TypeError(f"metric {key!r} reduces by {wanted.__name__}, got {type(value).__name__}")
            merged[key] = merged[key].merge(value) if key in merged else value
    return merged


def results(merged: Mapping[str, Reduction]) -> dict[str, float]:
    return {key: value.result() for key, value in merged.items() if not isinstance(value, Histogram)}


def histograms(merged: Mapping[str, Reduction]) -> dict[str, Histogram]:
    """Return the histograms to log. Empty histograms are left out."""
    return {key: value for key, value in merged.items() if isinstance(value, Histogram) and any(value.counts)}


def expected_metrics(traits: Iterable[str]) -> list[str]:
    """Return the names (with placeholders) of the numbers in every run with the given traits."""
    have = frozenset(traits)
    numbers = [metric for metric in METRICS.values() if metric.reduction is not Histogram]
    return [metric.name for metric in numbers if metric.always and metric.traits <= have]


def markdown() -> str:
    """Return the text of docs/metrics.md."""
    lines = [
        *("# Metrics", ""),
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
        *("", "Placeholders:", ""),
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
