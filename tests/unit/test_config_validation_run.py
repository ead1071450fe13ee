"""Every relation between keys: exit code 2 and a message that names key, values, rule and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.algorithms import ALGORITHMS
from rlhf.cli import main

ONLINE = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: ppo, kl: {coef: 0.01, estimator: k1, place: reward}}
data: {train: prompts.jsonl, eval: heldout.jsonl, max_prompt_tokens: 100}
rollouts: {prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 50}
rewards: {correct: {function: math_answer}}
train: {steps: 10, lr: 1e-6, sequences_per_update: 16, max_tokens_per_microbatch: 200}
"""
SFT = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: sft}
data: {train: examples.jsonl, eval: heldout.jsonl}
train: {steps: 10, lr: 1e-6, sequences_per_update: 16}
"""
GRPO = "algorithm={name: grpo}"
PAIRS = ["algorithm={name: online_dpo}", "train.sequences_per_update=8"]
CUDA = "cluster.device=cuda"
REWARD_MODEL = ["rewards.taste.role=reward", "reward.model=a/b"]
LORA = "policy.lora={}"
ELASTIC = "cluster.roles.rollout.engines={min: 1, max: 8}"
IN_FLIGHT = ["rollouts.max_staleness=1", "rollouts.weight_updates=in_flight", "algorithm.correction=none"]


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, overrides: list[str]) -> str:
    """What `rlhf plan` says, having exited with 2 and one line."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code = main(["plan", str(path), *overrides])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err or out
    assert err.startswith("rlhf: error: ")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("text", [ONLINE, SFT])
@pytest.mark.parametrize("override", ["run.seed=1", "train.lr_schedule=cosine"])
def test_the_unchanged_configs_pass(tmp_path: Path, text: str, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["plan", str(path), override]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        [GRPO, "algorithm.correction.preset=token_tis"],
        [GRPO, "algorithm.correction.preset=bypass_clip"],
        ["algorithm={name: raft}", "train.sequences_per_update=8"],
        PAIRS,
    ],
)
def test_a_repetition_penalty_is_allowed_where_the_sampler_may_be_another_policy(
    tmp_path: Path, overrides: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    assert main(["plan", str(path), *overrides, "rollouts.repetition_penalty=1.2", "rollouts.min_p=0.1"]) == 0


@pytest.mark.parametrize("correction", ["none", "null", "{preset: token_tis}"])
def test_rollouts_run_ahead_where_the_correction_is_given(tmp_path: Path, correction: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    ahead = [GRPO, "rollouts.max_staleness=1", f"algorithm.correction={correction}"]
    assert main(["plan", str(path), *ahead]) == 0


STREAMED = ["train.streamed=true", "train.sequences_per_update=32"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.streamed=true", GRPO, "train.epochs_per_batch=2"],
        [*STREAMED, GRPO, "rollouts.dynamic_sampling={}", "rollouts.oversample=1.5", "reward_policy.on_error=drop"],
        ["train.streamed=true", "algorithm={name: raft, keep: 2, min_score: 0.5}"],
        [*STREAMED, "algorithm={name: dr_grpo, mask_truncated: true, kl: {coef: 0.1}}"],
        [*STREAMED, "algorithm={name: reinforce, baseline: none}"],
    ],
)
def test_runs_that_can_be_streamed_pass(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    assert main(["plan", str(path), *overrides]) == 0


RELATIONS = {
    "streaming does not mix with whole batches ahead": (
        [*STREAMED, GRPO, "rollouts.max_staleness=1", "algorithm.correction=none"],
        "train.streamed: is true, but rollouts.max_staleness is 1, which trains on whole batches of earlier weights",
    ),
    "streaming needs engines of their own": (
        [*STREAMED, GRPO, "cluster.roles.rollout.colocate_with=policy"],
        "train.streamed: is true, but cluster.roles.rollout.colocate_with is policy: engines and policy take turns",
    ),
    "a critic is not streamed": ([*STREAMED], "ppo needs the whole batch first: the critic values a whole batch"),
    "greedy responses come last": (
        [*STREAMED, "algorithm={name: remax}"],
        "remax needs the whole batch first: its greedy responses are sampled after all others",
    ),
    "a mean of the batch is not streamed": (
        [*STREAMED, "algorithm={name: reinforce}"],
        "reinforce needs the whole batch first: its advantages are normalised over the batch",
    ),
    "a factor of the batch is not streamed": (
        [*STREAMED, "algorithm={name: gpg}"],
        "gpg needs the whole batch first: its advantages may depend on all groups of the batch",
    ),
    "covariances are not streamed": (
        [*STREAMED, "algorithm={name: clip_cov}"],
        "clip_cov needs the whole batch first: it chooses among the tokens of a whole optimizer step",
    ),
    "tokens of high entropy are not streamed": (
        [*STREAMED, "algorithm={name: grpo, top_entropy_fraction: 0.2}"],
        "grpo needs the whole batch first: it chooses among the tokens of a whole optimizer step",
    ),
    "pairs are not streamed": (
        [*PAIRS, "train.streamed=true"],
        "train.streamed: is true, but algorithm online_dpo learns from whole batches",
    ),
    "the balance of experts is a mean over the batch": (
        ["train.streamed=true", GRPO, "policy.router_balance_coef=0.01"],
        "train.streamed: is true, but policy.router_balance_coef is 0.01, a mean over the whole batch; set it to false",
    ),
    "minibatches that are known late are not streamed": (
        ["train.streamed=true", GRPO, "rollouts.dynamic_sampling={}"],
        "train.streamed: is true, but rollouts.dynamic_sampling decides late which responses are trained, and the "
        "minibatches of train.sequences_per_update 16 must be known before; set it to false, or "
        "train.sequences_per_update to 32, one minibatch",
    ),
    "a dropped group may change minibatches": (
        ["train.streamed=true", GRPO, "reward_policy.on_error=drop"],
        "train.streamed: is true, but reward_policy.on_error drop decides late which responses are trained",
    ),
    "old responses need a decision about the correction": (
        [GRPO, "rollouts.max_staleness=2"],
        "algorithm.correction: is missing, and with rollouts.max_staleness 2 the policy trains on responses of earlier "
        "weights; give {preset: token_tis}, or write none",
    ),
    "rollouts ahead of training need engines of their own": (
        [
            GRPO,
            "rollouts.max_staleness=1",
            "algorithm.correction=none",
            "cluster.roles.rollout.colocate_with=policy",
        ],
        "rollouts.max_staleness: is 1, but cluster.roles.rollout.colocate_with is policy: engines and policy take",
    ),
    "the order of completion is not repeatable": (
        [GRPO, "rollouts.max_staleness=1", "algorithm.correction=none", "rollouts.batch_order=completion"],
        "rollouts.batch_order: is completion, but rollouts.weight_updates between_batches promises runs that repeat",
    ),
    "in flight cancels no slow prompt": (
        [
            GRPO,
            "rollouts.max_staleness=1",
            "algorithm.correction=none",
            "rollouts.weight_updates=in_flight",
            "rollouts.oversample=1.5",
        ],
        "rollouts.oversample: is 1.5, but with rollouts.weight_updates in_flight no prompt is cancelled",
    ),
    "continued responses need a decision about the correction": (
        [GRPO, "rollouts.oversample=1.5", "rollouts.carry_over=true"],
        "algorithm.correction: is missing, and with rollouts.carry_over the policy trains on responses of earlier",
    ),
    "only cancelled responses are continued": (
        [GRPO, "algorithm.correction=none", "rollouts.carry_over=true"],
        "rollouts.carry_over: is true, but rollouts.oversample is 1: a step awaits all its responses",
    ),
    "continued responses would exceed the bound": (
        [
            GRPO,
            "rollouts.max_staleness=1",
            "algorithm.correction=none",
            "rollouts.oversample=1.5",
            "rollouts.carry_over=true",
        ],
        "rollouts.carry_over: is true, but with rollouts.max_staleness 1 a continued response would lag by more",
    ),
    "conversations are not continued": (
        [
            GRPO,
            "algorithm.correction=none",
            "rollouts.oversample=1.5",
            "rollouts.carry_over=true",
            "rollouts.environment={name: calculator, max_tokens: 200}",
        ],
        "rollouts.carry_over: is true, but a conversation with rollouts.environment cannot be continued",
    ),
    "streaming trains on new responses": (
        [
            GRPO,
            "algorithm.correction=none",
            "rollouts.oversample=1.5",
            "rollouts.carry_over=true",
            "train.streamed=true",
            "train.sequences_per_update=32",
        ],
        "train.streamed: is true, but rollouts.carry_over is true, which trains on responses of earlier weights; ",
    ),
    "updates in flight need a bound": (
        [GRPO, "rollouts.weight_updates=in_flight"],
        "rollouts.weight_updates: has no effect here: rollouts.max_staleness is 0",
    ),
    "only updates in flight meet keys and values": (
        [GRPO, "rollouts.max_staleness=1", "algorithm.correction=none", "rollouts.kv_after_update=keep"],
        "rollouts.kv_after_update: has no effect here: rollouts.weight_updates is between_batches",
    ),
    "a penalty needs importance weights": (
        [GRPO, "rollouts.repetition_penalty=1.2"],
        "rollouts.repetition_penalty: is 1.2, but algorithm grpo trains on log-probabilities without the penalty, as "
        "if the sampler had none; set algorithm.correction.preset to token_tis",
    ),
    # 8 * 4 = 32 responses; 32 is no multiple of 12, and the largest divisor of 32 below 12 is 8
    "minibatches divide the batch": (
        ["train.sequences_per_update=12"],
        "train.sequences_per_update: is 12 and must divide rollouts.prompts_per_step * rollouts.samples_per_prompt = "
        "8 * 4 = 32; 8 would fit",
    ),
    "minibatches divide what is kept": (
        [GRPO, "rollouts.keep_per_prompt={count: 3}", "train.sequences_per_update=16"],
        "is 16 and must divide rollouts.prompts_per_step * rollouts.keep_per_prompt.count = 8 * 3 = 24; 12 would fit",
    ),
    "minibatches divide what raft keeps": (
        ["algorithm={name: raft, keep: 3}", "train.sequences_per_update=16"],
        "must divide rollouts.prompts_per_step * algorithm.keep = 8 * 3 = 24; 12 would fit",
    ),
    "some are left out": (
        [GRPO, "rollouts.keep_per_prompt={count: 4}"],
        "rollouts.keep_per_prompt.count: is 4 and must be below rollouts.samples_per_prompt = 4",
    ),
    "what is kept can be compared": (
        [GRPO, "rollouts.keep_per_prompt={count: 1}", "train.sequences_per_update=8"],
        "rollouts.keep_per_prompt.count: is 1, but grpo compares the kept responses; keep 2 or more",
    ),
    "raft keeps no more than there are": (["algorithm={name: raft, keep: 5}", "train.sequences_per_update=8"], "lower"),
    "raft rejects some": (
        ["algorithm={name: raft, keep: 4}"],
        "algorithm.keep: is 4 = rollouts.samples_per_prompt, so no response is rejected; lower it, or set min_score",
    ),
    "a set of k has others to be compared with": (
        ["algorithm={name: pass_at_k}"],
        "algorithm.k: is 4 and must be at most 3, because sets are chosen among rollouts.samples_per_prompt = 4 ",
    ),
    "a set of k fits the group": (
        ["algorithm={name: pass_at_k, baseline: leave_one_out, k: 5}"],
        "algorithm.k: is 5 and must be at most 4",
    ),
    "gdpo has several rewards": (
        ["algorithm={name: gdpo}", "rewards.watched={function: exact_match, weight: 0}"],
        "rewards: has 1 with a weight other than 0, but gdpo needs at least two; add one, or use grpo",
    ),
    "no reward has the greedy one's name": (
        ["rewards.greedy.function=exact_match"],
        "rewards.greedy: is taken",
    ),
    "muon has whole matrices": (
        ["train.optimizer=muon", GRPO],
        "cluster.roles.policy.zero_stage: is 2, but train.optimizer muon needs whole matrices, which DeepSpeed cuts up",
    ),
    "nothing is offloaded at stage 0": (
        [CUDA, "cluster.roles.policy={zero_stage: 0, offload: [optimizer]}"],
        "cluster.roles.policy.offload: is ['optimizer'], but DeepSpeed offloads nothing at stage 0",
    ),
    "steps or epochs": (["train.epochs=2"], "train.epochs: is 2, but train.steps is 10; give one of them"),
    "no end of the run": (["train.steps=null"], "train.steps: is missing; give the run's steps, or train.epochs"),
    "warm-up by steps or by a share": (
        ["train.warmup_steps=2", "train.warmup_ratio=0.1"],
        "train.warmup_ratio: is 0.1, but train.warmup_steps is 2; give one of them",
    ),
    "a minibatch is no larger than the batch": (
        ["train.sequences_per_update=64"],
        "has only rollouts.prompts_per_step",
    ),
    "the longest sequence fits": (
        ["train.max_tokens_per_microbatch=149"],
        "is 149 and must hold the longest sequence: data.max_prompt_tokens + rollouts.max_new_tokens = 100 + 50 = 150",
    ),
    "groups to choose from have two responses": (
        ["algorithm={name: grpo}", "rollouts.samples_per_prompt=1", "train.sequences_per_update=8"],
        "rollouts.samples_per_prompt: is 1, but grpo compares the responses to one prompt",
    ),
    "a band of means has something in it": (
        ["rollouts.dynamic_sampling={min_mean: 0.5, max_mean: 0.25}"],
        "`min_mean` 0.5 is above `max_mean` 0.25",
    ),
    "a curriculum's band has something in it": (
        ["data.curriculum={low: 0.95}"],
        "`low` 0.95 is above `high` 0.9",
    ),
    "every rank has a sequence": (
        ["cluster.roles.policy.workers=17"],
        "train.sequences_per_update: is 16, but 17 data-parallel ranks of cluster.roles.policy",
    ),
    "every rank of the critic has one": (
        ["cluster.roles.critic={workers: 17, colocate_with: null}"],
        "17 data-parallel ranks of cluster.roles.critic",
    ),
    "ranks that share micro-batches divide the workers": (
        ["cluster.roles.policy={workers: 3, sequence_parallel: 2}"],
        "cluster.roles.policy.sequence_parallel: is 2 and must divide cluster.roles.policy.workers = 3",
    ),
    "a group has two responses": (
        [GRPO, "rollouts.samples_per_prompt=1", "train.sequences_per_update=4"],
        "rollouts.samples_per_prompt: is 1, but grpo compares the responses to one prompt",
    ),
    # 10 steps * 32/16 updates = 20
    "the warm-up ends": (["train.warmup_steps=20"], "is 20 and must be below the run's 20 optimizer steps"),
    # (10 - 6) * 2 = 8: the policy rests in the first 6 steps
    "the warm-up ends after the critic's": (
        ["train.warmup_steps=8", "algorithm.critic_warmup_steps=6"],
        "is 8 and must be below the run's 8 optimizer steps",
    ),
    "the policy is trained": (
        ["algorithm.critic_warmup_steps=10"],
        "algorithm.critic_warmup_steps: is 10 and must be below train.steps = 10",
    ),
    "a step has no more pairs than prompts": (
        PAIRS[:1],
        "train.sequences_per_update: is 16, but a step has only 8 pairs, one per prompt",
    ),
    "minibatches divide the pairs": (
        [PAIRS[0], "train.sequences_per_update=3"],
        "train.sequences_per_update: is 3 and must divide rollouts.prompts_per_step = 8; 2 would fit",
    ),
    "both responses of a pair fit": (
        [*PAIRS, "train.max_tokens_per_microbatch=199"],
        "is 199 and must hold both responses of a pair: data.max_prompt_tokens + 2 * rollouts.max_new_tokens = 100 + "
        "2 * 50 = 200",
    ),
    "a pair has two responses": (
        [*PAIRS, "rollouts.samples_per_prompt=1"],
        "rollouts.samples_per_prompt: is 1, but online_dpo compares the responses to one prompt",
    ),
    "pairs have no advantages": (
        [*PAIRS, "algorithm.clip_low=0.1"],
        "algorithm.clip_low: is a key of `ppo`, `grpo`, ",
    ),
    "pairs have no penalty": ([*PAIRS, "algorithm.kl.coef=0.1"], "algorithm.kl: is a key of `ppo`, `grpo`, "),
    # 10 steps * 8/8 updates = 10
    "the warm-up ends with pairs too": (
        [*PAIRS, "train.warmup_steps=10"],
        "is 10 and must be below the run's 10 optimizer steps",
    ),
    "a reference does not become a policy with an adapter": (
        [*PAIRS, "algorithm.reference_every=2", LORA],
        "algorithm.reference_every: is 2, but a policy with policy.lora is exported as an adapter only",
    ),
    "nor does that of an algorithm with advantages": (
        ["algorithm={name: grpo, kl: {coef: 0.1}, reference_every: 2}", LORA],
        "algorithm.reference_every: is 2, but a policy with policy.lora is exported as an adapter only",
    ),
    "a straight-through estimator has a gradient": (
        ["algorithm.kl.estimator=k3_straight_through"],
        "algorithm.kl.estimator: is k3_straight_through, but algorithm.kl.place is reward, where nothing has a "
        "gradient; set k3",
    ),
    "a penalty in the loss has a gradient": (
        ["algorithm={name: grpo, kl: {coef: 0.1, estimator: k1}}"],
        "algorithm.kl.estimator: is k1, but algorithm.kl.place is loss, where its mean gradient is 0",
    ),
    "an adaptive entropy bonus starts within its bound": (
        ["algorithm={name: grpo, entropy: {coef: 0.1, adaptive: {target: 0.3, max_coef: 0.05}}}"],
        "algorithm.entropy.coef: is 0.1, above algorithm.entropy.adaptive.max_coef 0.05; lower it",
    ),
    "the overlong buffer is a part of the response": (
        ["algorithm={name: dapo, overlong: {buffer: 51}}"],
        "algorithm.overlong.buffer: is 51 and must be at most rollouts.max_new_tokens = 50",
    ),
    "an adaptive coefficient starts above 0": (
        ["algorithm.kl={coef: 0, adaptive: {target: 1}}"],
        "algorithm.kl.adaptive: multiplies algorithm.kl.coef, which is 0 and stays 0",
    ),
    "no step makes an adaptive coefficient negative": (
        ["algorithm.kl.adaptive={target: 1, horizon: 6}"],  # 1 - 0.2 * 32 / 6 = -0.07; with 7 it would be 0.09
        "algorithm.kl.adaptive.horizon: is 6, but a step of 32 responses can lower the coefficient by 107%, to 0 or "
        "below; set 7 or more",
    ),
    "a correction corrects": (
        ["algorithm.correction={}"],
        "algorithm.correction: corrects nothing: name a preset",
    ),
    "a correction is not counted twice": (
        ["algorithm.correction={mode: bypass, weights: token_truncated}"],
        "algorithm.correction.weights: is token_truncated, but with mode bypass the clipped ratio already",
    ),
    "weights cannot be added to a bypass": (
        ["algorithm.correction={preset: bypass_clip, weights: token_truncated}"],
        "algorithm.correction.weights: is token_truncated",
    ),
    "a bypass has a ratio to act on": (
        ["algorithm={name: gpg, correction: {preset: bypass_clip}}"],
        "algorithm.correction.mode: is bypass, but algorithm gpg has no importance ratio that it would act on; set "
        "policy_gradient and choose weights, or reject",
    ),
    "what agrees is not rejected": (
        ["algorithm.correction={reject: {geometric_mean_ratio: [1.1, 2]}}"],
        "algorithm.correction.reject.geometric_mean_ratio: got [1.1, 2.0], expected [low, high] with low < 1 < high",
    ),
    "a rejection has a bound": (
        ["algorithm.correction={reject: {token_k1: [null, null]}}"],
        "algorithm.correction.reject.token_k1: both bounds are null",
    ),
    "a rejection is known": (
        ["algorithm.correction={reject: {seq_mean_k3: 0.1}}"],
        "algorithm.correction.reject.seq_mean_k3: unknown key; did you mean "
        "algorithm.correction.reject.sequence_mean_k3?",
    ),
    "rollouts are there": (["rollouts=null"], "rollouts: is missing: algorithm ppo samples responses"),
    "a reward is there": (["rewards={}"], "rewards: is missing"),
    "a reward counts": (["rewards.correct.weight=0"], "rewards: all have weight 0"),
    "the reward model is there": (
        ["rewards.taste.role=reward"],
        "reward: is missing: rewards.taste has `role: reward`",
    ),
    "score is no reward's name": (["rewards.score.function=f"], "rewards.score: is taken"),
    "no reward has the name of an evaluation's metric": (
        ["rewards.truncated.function=f"],
        "rewards.truncated: is taken: eval/<set>/truncated is the fraction of truncated responses",
    ),
    "a mapping of evaluation sets names one": (["data.eval={}"], "data.eval: is an empty mapping"),
    "the best metric is evaluated": (
        ["train.best_metric=eval/other/score"],
        "train.best_metric: got 'eval/other/score', expected a metric of an evaluation, with or without a leading `-`: "
        "eval/heldout/score, eval/heldout/score_low",
    ),
    "a vote needs its samples": (
        ["eval.temperature=1.0", "eval.samples_per_prompt=4", "eval.k=[1, 8]"],
        "eval.k: has 8, but eval.samples_per_prompt is 4; raise it, or lower k",
    ),
    "a single run has no stages": (
        ["policy.model=stage:sft"],
        "policy.model: got 'stage:sft', but this run is not a pipeline's stage",
    ),
    "a Ray of the run's own is written null": (["cluster.address=local"], "cluster.address: is local; a Ray that is"),
    "a gate is another reward": (
        ["rewards.correct.gate=corect"],
        "rewards.correct.gate: is corect, expected the name of another reward; there are: none",
    ),
    "a reward is not its own gate": (["rewards.correct.gate=correct"], "rewards.correct.gate: is correct, expected"),
    "a group of one is not normalised": (
        ["rewards.correct.normalize=group", "rollouts.samples_per_prompt=1", "train.sequences_per_update=8"],
        "rewards.correct.normalize: is group, but rollouts.samples_per_prompt is 1",
    ),
    "what is compared with a greedy response is not normalised": (
        ["algorithm={name: remax}", "rewards.correct.normalize=group"],
        "rewards.correct.normalize: is group, but algorithm remax compares with the score of a greedy response alone",
    ),
    "a service says nothing of steps": (
        ["rewards.taste={url: 'http://h/', credit: step}"],
        "rewards.taste: `credit: step` needs a function that is not built in, `role: reward` or `environment: true`",
    ),
    "an environment that failed has no score": (
        ["rewards.won={environment: true, on_error: 0.0}"],
        "rewards.won: `on_error` may be `fail` or `drop` where an environment gives the reward",
    ),
    "masked responses have no penalty in the reward": (
        ["algorithm={name: rloo, mask_truncated: true}"],
        "algorithm.mask_truncated: is true and algorithm.kl.place is reward, but rloo also compares masked responses",
    ),
    "a score on errors is a number": (
        ["rewards.correct.on_error=true"],
        "rewards.correct.on_error: got true, expected",
    ),
    "a score on errors is finite": (["rewards.correct.on_error=.nan"], "rewards.correct.on_error: got '.nan'"),
    "a built-in says nothing of steps": (
        ["rewards.correct.credit=step"],
        "rewards.correct: `credit: step` needs a function that is not built in",
    ),
    "steps are no responses to be normalised": (
        ["rewards.taste={function: 'f.py:g', credit: step, normalize: group}"],
        "rewards.taste: `normalize: group` compares whole responses, and `credit: step` is of their steps",
    ),
    "a reward model has steps to be credited": (
        [*REWARD_MODEL, "rewards.taste.credit=step"],
        "rewards.taste.credit: is step, but reward.steps is null: set reward.steps.separator to the text at the end",
    ),
    "a baseline of whole responses has no steps": (
        [
            "algorithm={name: reinforce_plus_plus, group_baseline: true}",
            "rewards={f: {function: 'f.py:g', credit: step}}",
        ],
        "algorithm.group_baseline: is true, which compares whole responses, but rewards.f.credit is step",
    ),
    "rewards that are compared one by one have no steps": (
        ["algorithm={name: gdpo}", "rewards={f: {function: 'f.py:g', credit: step}, h: {function: math_answer}}"],
        "rewards.f.credit: is step, but algorithm gdpo weighs a response as a whole; use ppo, grpo or response",
    ),
    "a penalty on whole responses is not compared with steps": (
        ["algorithm={name: grpo, kl: {coef: 0.1, place: reward}}", "rewards={f: {function: 'f.py:g', credit: step}}"],
        "algorithm.kl.place: is reward, a penalty on whole responses, but rewards.f.credit is step; set it to loss",
    ),
    "secrets stay out of a judge's request": (
        ["rewards.taste={url: 'http://h/v1', judge: {model: m, request: {api_key: x}}}"],
        "rewards.taste.judge.request.api_key: looks like a secret",
    ),
    "secrets stay out of a url": (
        ["rewards.taste.url=http://h/score?api_key=x"],
        "rewards.taste.url: `url` holds a secret, and the config is written to the run folder: use `token_env`",
    ),
    "a url is one": (["rewards.taste.url=h:80/score"], "rewards.taste.url: `url` must be http://HOST"),
    "an attempt fits into its request": (
        ["rewards.taste={url: 'http://h/', http: {timeout_s: 9, deadline_s: 8}}"],
        "rewards.taste.http: `timeout_s` 9 is above `deadline_s` 8",
    ),
    "a judge is asked about the response": (
        ["rewards.taste={url: 'http://h/', judge: {model: m, prompt: what}}"],
        "rewards.taste.judge.prompt: `prompt` must hold {response}",
    ),
    "without an agent a judge has no result": (
        ["rewards.taste={url: 'http://h/', judge: {model: m, prompt: '{result}'}}"],
        "rewards.taste.judge.prompt: must hold {response}",
    ),
    "secrets stay out": (["rewards.correct.args.api_key=x"], "rewards.correct.args.api_key: looks like a secret"),
    "secrets stay out of trackers": (
        ["tracking.trackers={shop: {headers: [{X-Api-Key: x}]}}"],
        "tracking.trackers.shop.headers.X-Api-Key: looks like a secret",
    ),
    "secrets stay out of nested arguments": (
        ["rewards.correct.args={ask: [{headers: {X-Api-Key: x}}]}"],
        "rewards.correct.args.ask.headers.X-Api-Key: looks like a secret",
    ),
    "secrets stay out of credentials": (
        ["rewards.correct.args={credentials: {pin: 1234}}"],
        "rewards.correct.args.credentials.pin: looks like a secret",
    ),
    "secrets stay out of an argument's url": (
        ["rewards.correct.args={where: 'https://host/a?token=x'}"],
        "rewards.correct.args.where: looks like a secret",
    ),
    "a reward's own limit is below the pool's": (
        ["rewards.correct.function=code_tests", "reward_policy.timeout_s=8"],
        "reward_policy.timeout_s: is 8, but `code_tests` may take 8 s (rewards.correct.args.limit_s)",
    ),
    "an own limit that is given": (
        ["rewards.correct.function=math_answer", "rewards.correct.args.limit_s=20"],
        "reward_policy.timeout_s: is 10, but `math_answer` may take 20 s",
    ),
    "offload is for GPUs": (
        ["cluster.roles.policy.offload=[optimizer]"],
        "with cluster.device cpu all is in host memory",
    ),
    "parameters are offloaded in stage 3": (
        [CUDA, "cluster.roles.policy.offload=[parameters]"],
        "has `parameters`, which needs cluster.roles.policy.zero_stage 3, not 2",
    ),
    "tensor parallelism is for GPUs": (
        ["cluster.roles.rollout.tensor_parallel=2"],
        "cluster.roles.rollout.tensor_parallel: is 2, but tensor parallelism needs cluster.device cuda",
    ),
    "an engine beside each rank at most": (
        ["cluster.roles.rollout={engines: 2, colocate_with: policy}"],
        "is policy, with 1 workers for 2 engines",
    ),
    "engines join and leave in flight only": (
        [ELASTIC, "cluster.roles.reward.colocate_with=policy"],
        "cluster.roles.rollout.engines: has min and max, but rollouts.weight_updates between_batches promises runs",
    ),
    "the fewest engines are not more than the most": (
        [*IN_FLIGHT, "cluster.roles.rollout.engines={min: 3, max: 2}", "cluster.roles.reward.colocate_with=policy"],
        "cluster.roles.rollout.engines.min: is 3, more than max, which is 2",
    ),
    "no role stays with an engine that leaves": (
        [*IN_FLIGHT, ELASTIC],
        "cluster.roles.reward.colocate_with: is rollout, but engines join and leave during the run",
    ),
    "weights in the memory of one host do not reach an engine that joins on another": (
        [
            *IN_FLIGHT,
            ELASTIC,
            "cluster.roles.reward.colocate_with=policy",
            "cluster.address=10.0.0.1:6379",
            "cluster.weight_sync=shm",
        ],
        "cluster.weight_sync: is shm, which stays on one host, but engines may join on others",
    ),
    "an engine of several GPUs shares none with the policy": (
        [CUDA, "cluster.roles.policy.workers=2", "cluster.roles.rollout={colocate_with: policy, tensor_parallel: 2}"],
        "cluster.roles.rollout.colocate_with: is policy, but Ray shares out single GPUs only",
    ),
    "an engine of several GPUs shares none with a reward model": (
        [CUDA, "cluster.roles.rollout.tensor_parallel=2", *REWARD_MODEL],
        "cluster.roles.reward.colocate_with: is rollout, but Ray shares out single GPUs only",
    ),
    "a guest beside each host at most": (
        ["cluster.roles.critic.workers=2"],
        "cluster.roles.critic.workers: is 2, but it is colocated with policy, which has 1 workers",
    ),
    "a guest beside each engine at most": (
        ["cluster.roles.reward.workers=2"],
        "cluster.roles.reward.workers: is 2, but it is colocated with rollout, which has 1 engines",
    ),
    "an adapter to go on from is trained with lora": (
        ["policy.adapter=some/folder"],
        "policy.adapter: is some/folder, but policy.lora is null; write `lora: {}`",
    ),
    "a critic's too": (["critic={model: a/b, adapter: c}"], "critic.adapter: is c, but critic.lora is null"),
    "an adapter of a stage is for pipelines": (
        [LORA, "policy.adapter=stage:sft"],
        "policy.adapter: got 'stage:sft', but this run is not a pipeline's stage",
    ),
    "pissa is no dora": (["policy.lora={init: pissa, dora: true}"], "policy.lora.init: is pissa, but dora needs"),
    "peft adapts stacks plainly": (
        ["policy.lora={target_parameters: [down_proj], dora: true, dropout: 0.1}"],
        "policy.lora.target_parameters: adapts stacked experts, for which peft has no dropout and no dora",
    ),
    "replay needs advantages": (
        [*PAIRS, "policy.router_replay=true"],
        "policy.router_replay: is true, but algorithm online_dpo does not train by advantages; set false",
    ),
    "carried responses have no experts": (
        [
            "policy.router_replay=true",
            "rollouts.carry_over=true",
            "rollouts.oversample=1.5",
            "algorithm.correction=none",
        ],
        "policy.router_replay: is true, but rollouts.carry_over keeps no experts",
    ),
    "pissa takes whole weights": (
        ["policy.lora={init: pissa, quantize: nf4}"],
        "policy.lora.init: is pissa, which decomposes the weights, but policy.lora.quantize",
    ),
    "a module is adapted or trained whole": (
        ["policy.lora={target_modules: [q_proj, o_proj], modules_to_save: [o_proj]}"],
        "policy.lora.modules_to_save: has o_proj, which policy.lora.target_modules adapts",
    ),
    "4 bits are not sharded": (
        ["policy.lora.quantize=nf4", "cluster.roles.policy.zero_stage=3"],
        "cluster.roles.policy.zero_stage: is 3, but DeepSpeed does not shard 4-bit weights (policy.lora.quantize)",
    ),
    "a critic's neither": (
        ["critic={model: a/b, lora: {quantize: nf4}}", "cluster.roles.critic.zero_stage=3"],
        "cluster.roles.critic.zero_stage: is 3, but DeepSpeed does not shard 4-bit weights (critic.lora.quantize)",
    ),
    "nccl is for GPUs": (["cluster.weight_sync=nccl"], "cluster.weight_sync: is nccl, which needs cluster.device cuda"),
    "shm is for CPUs": (
        [CUDA, "cluster.weight_sync=shm"],
        "cluster.weight_sync: is shm, which is for cluster.device cpu",
    ),
    "ipc is for shared GPUs": ([CUDA, "cluster.weight_sync=ipc"], "is ipc, which needs engines on the policy's GPUs"),
    "nccl is not for shared GPUs": (
        [CUDA, "cluster.weight_sync=nccl", "cluster.roles.rollout.colocate_with=policy"],
        "is nccl, which cannot join processes on one GPU",
    ),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_impossible_relation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    overrides, message = RELATIONS[name]
    assert message in refusal(tmp_path, capsys, ONLINE, overrides)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["data.max_sequence_tokens=8193"],
            "data.max_sequence_tokens: is 8193 and must be at most 8192: train.max_tokens_per_microbatch = 8192",
        ),
        (["data.too_long=skip"], "data.too_long: is skip, but data.max_unusable_fraction is 0"),
        (["data.train={}"], "data.train: is an empty mapping"),
    ],
)
def test_the_limits_of_offline_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], text: str
) -> None:
    assert text in refusal(tmp_path, capsys, SFT, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.max_sequence_tokens=8192", "data.too_long=cut", "data.max_unusable_fraction=0.99"],
        ["data.too_long=skip", "data.max_unusable_fraction=0.01"],
        ["data.train={a: {source: a.jsonl}, b.c: {source: {task: running_totals, size: 3}, weight: 0.5}}"],
        ["data.train={only: {source: a.jsonl}}"],
    ],
)
def test_offline_data_that_can_be_read(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SFT)
    assert main(["plan", str(path), *overrides]) == 0


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("cluster.roles.policy.zero_stage=0", "cluster.roles.policy.zero_stage: is 0, but an engine takes turns"),
        ("cluster.roles.critic.zero_stage=1", "cluster.roles.critic.zero_stage: is 1, but an engine takes turns"),
        (
            "cluster.roles.policy={zero_stage: 3, offload: [parameters]}",
            "cluster.roles.policy.offload: has `parameters`, but an engine takes turns",
        ),
    ],
)
def test_beside_an_engine_states_must_be_movable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, text: str
) -> None:
    beside = "cluster.roles.rollout.colocate_with=policy"
    assert text in refusal(tmp_path, capsys, ONLINE, [CUDA, beside, override])
    path = tmp_path / "apart.yaml"
    path.write_text(ONLINE)
    assert main(["plan", str(path), CUDA, override]) == 0


def test_beside_an_engine_zero_3_takes_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = "cluster.roles.rollout.colocate_with=policy"
    message = refusal(tmp_path, capsys, ONLINE, [CUDA, LORA, beside, "cluster.roles.policy.zero_stage=3"])
    assert "cluster.roles.policy.zero_stage: is 3, but an engine takes turns" in message


BY_STEP = "rewards={f: {function: 'f.py:g', credit: step}}"
FROM_SCORES = [
    name
    for name, one in ALGORITHMS.items()
    if one.config_class().kind in ("advantages", "sampled_pairs") and name != "gdpo"
]
WITHOUT_STEPS = ("gmpo", "vespo", "rloo", "opo", "gpg", "pass_at_k", "remax", "raft", "online_dpo")


@pytest.mark.parametrize("name", FROM_SCORES)
def test_an_algorithm_takes_steps_or_refuses_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"pass_at_k": ", k: 2"}.get(name, "")
    overrides = [f"algorithm={{name: {name}{keys}}}", BY_STEP, "train.sequences_per_update=8"]
    if name in WITHOUT_STEPS:
        message = (
            f"rewards.f.credit: is step, but algorithm {name} weighs a response as a whole; use ppo, grpo or response"
        )
        assert message in refusal(tmp_path, capsys, ONLINE, overrides)
        return
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    assert main(["plan", str(path), *overrides]) == 0
