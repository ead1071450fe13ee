"""A key without effect is refused with a reason and a fix, and a key with an effect is not."""

from __future__ import annotations

import pytest

from tests.fixtures.configs import CUDA, GRPO, LORA, ONLINE, PAIRS, SFT, changed, refusal

RAFT = ["algorithm={name: raft}", "train.sequences_per_update=8"]
ADAPTED = [LORA, "policy.adapter=a"]
WATCHED = "rewards={taste: {role: reward}, watched: {function: length_penalty, weight: 0}}"
STEPS = "reward={model: a/b, steps: {separator: ';'}}"
ADAFACTOR = "train.optimizer=adafactor"
RATIO = "every ratio is 1"
WHOLE_BATCH = "train.sequences_per_update=32"
REWARD_MODEL = ["rewards={taste: {role: reward}}", "reward.model=a/b"]

INERT: list[tuple[str, list[str], str]] = [
    ("critic.model=a/b", [GRPO], "algorithm grpo has no critic"),
    ("cluster.roles.critic.workers=2", [GRPO], "this run starts no critic role; remove the key, or use ppo"),
    ("cluster.roles.reference.workers=2", ["algorithm.kl={coef: 0}"], "set algorithm.kl.coef above 0"),
    ("reference.model=a/b", ["algorithm.kl={coef: 0}"], "algorithm.kl.coef is 0"),
    ("reference={model: some/model}", [LORA], "the policy with its LoRA adapter disabled is the same model"),
    ("cluster.roles.reference.cpus=2", [LORA], "the policy with its adapter off is the reference"),
    ("policy.lora.rank=8", ADAPTED, "policy.adapter names an adapter, which has its own"),
    ("policy.lora.rank=16", ADAPTED, "policy.adapter names an adapter, which has its own"),
    ("policy.lora.dora=true", ADAPTED, "policy.adapter names an adapter, which has its own"),
    ("critic.lora.init=pissa", ["critic={model: a/b, lora: {}, adapter: c}"], "critic.adapter names an adapter, which"),
    ("cluster.roles.reference.cpus=3", ADAPTED, "this run starts no reference role"),
    ("reward.model=a/b", [], "no reward uses it"),
    ("algorithm.reference_every=10", PAIRS, "before a new reference is read"),
    ("algorithm.reference_every=11", [], "before a new reference is read"),
    ("algorithm.reference_every=2", [GRPO], "algorithm.kl.coef is 0"),
    ("algorithm.label_smoothing=0.1", ["algorithm={name: online_dpo, loss: ipo}", PAIRS[1]], "loss ipo does not read"),
    ("cluster.roles.critic.threads=1", PAIRS, "this run starts no critic role"),
    ("cluster.roles.reference.threads=1", [*PAIRS, LORA], "the policy with its adapter off is the reference"),
    ("reward_policy.max_dropped_fraction=0.4", PAIRS, "reward_policy.on_error is fail"),
    ("data.max_unusable_fraction=0.5", PAIRS, "algorithm online_dpo skips only prompts that are too long"),
    ("algorithm.kl.estimator=k2", [GRPO], "algorithm.kl.coef is 0"),
    ("algorithm.kl.place=reward", [GRPO], "algorithm.kl.coef is 0"),
    ("algorithm.lam=0.9", ["algorithm.lam_alpha=0.05"], "algorithm.lam_alpha is 0.05"),
    ("algorithm.clip_low=0.1", [WHOLE_BATCH], RATIO),
    ("algorithm.clip_high=0.1", [WHOLE_BATCH], RATIO),
    ("algorithm.dual_clip=3", [WHOLE_BATCH], RATIO),
    ("algorithm.max_ratio=3", ["algorithm={name: cispo}", WHOLE_BATCH], RATIO),
    ("algorithm.temperature_positive=2", ["algorithm={name: sapo}", WHOLE_BATCH], RATIO),
    ("algorithm.correction={off_policy_mask: 0.1}", RAFT, "algorithm raft has no tokens of negative advantage; remove"),
    ("algorithm.advantage_clip=2", RAFT, "algorithm raft imitates what it keeps, without advantages"),
    (
        "algorithm.min_covariance=0.5",
        ["algorithm={name: clip_cov, correction: {preset: bypass_pg_is}}"],
        "mode is policy_gradient, whose",
    ),
    ("cluster.weight_sync=gloo", [LORA], "the engines load only the LoRA adapter, from a folder of the run"),
    ("algorithm.beta=0.2", ["algorithm={name: dro}", WHOLE_BATCH], RATIO),
    ("algorithm.penalty=2", ["algorithm={name: kl_cov}", WHOLE_BATCH], RATIO),
    ("algorithm.max_decrease=0.1", ["algorithm={name: dppo}", WHOLE_BATCH], RATIO),
    ("algorithm.half_life=8", ["algorithm={name: fipo}", WHOLE_BATCH], RATIO),
    ("algorithm.privileged.success_score=0.5", ["algorithm={name: rlsd}"], "template has no {better_response}"),
    ("algorithm.power_negative=1", ["algorithm={name: vespo}", WHOLE_BATCH], RATIO),
    (
        "algorithm.gamma=0.9",
        ["algorithm={name: reinforce, baseline: response_mean}"],
        "baseline is response_mean",
    ),
    ("algorithm.correction.second_moment=0.1", ["algorithm.correction={mode: bypass}"], "of the whole step are not"),
    ("algorithm.clip_low=0.3", ["algorithm={name: gmpo}", WHOLE_BATCH], RATIO),
    ("algorithm.clip_low=0.4", [GRPO, "rollouts.keep_per_prompt={count: 2}"], "batch of 16 responses is trained on"),
    ("rollouts.keep_per_prompt={count: 2}", PAIRS, "algorithm online_dpo trains on one pair of them"),
    (
        "rollouts.keep_per_prompt={count: 3}",
        ["algorithm={name: raft, keep: 2}"],
        "algorithm raft keeps the best without",
    ),
    ("data.curriculum={}", [GRPO, "data.train={task: running_totals, size: 160}"], "= 80 prompts are needed, and data"),
    ("algorithm.value_clip=0.1", [WHOLE_BATCH], "the values are still the old ones"),
    ("algorithm.value_clip=0.2", [WHOLE_BATCH, "algorithm.correction={mode: bypass}"], "the values are still the old"),
    ("algorithm.clip_low=0.45", ["algorithm.correction={preset: bypass_pg_is}"], "whose loss has no importance ratio"),
    ("algorithm.correction.max_ratio=3", ["algorithm.correction={preset: geo_rs}"], "correction.weights is null"),
    ("algorithm.correction.min_ratio=0.5", ["algorithm.correction={mode: bypass}"], "correction.weights is null"),
    ("rollouts.dynamic_sampling={}", [], "ppo learns from responses of equal scores too, and no bound of the mean"),
    ("rollouts.dynamic_sampling.max_filtered_fraction=2", ["algorithm={name: remax}"], "remax learns from responses"),
    ("reward_policy.max_dropped_fraction=0.5", [], "reward_policy.on_error is fail"),
    (
        "eval.k=[1, 2]",
        [WATCHED, "reward.model=a/b", "eval={temperature: 1, samples_per_prompt: 2}"],
        "no reward function with a weight above 0 judges more than length and repetition, and eval.pass_score is null",
    ),
    ("reward_policy.timeout_s=5", REWARD_MODEL, "no reward is a function"),
    ("reward.steps.combine=mean", ["rewards={taste: {role: reward, credit: step}}", STEPS], "credit is step: nothing"),
    ("reward_policy.processes=2", REWARD_MODEL, "no reward is a function"),
    ("rewards.correct.token_env=T", [], "rewards.correct.url is null: the reward is not a service"),
    ("rewards.correct.judge.model=m", [], "rewards.correct.url is null: the reward is not a service"),
    ("rewards.correct.http.timeout_s=5", [], "rewards.correct.url is null: the reward is not a service"),
    (
        "rewards.taste.judge.scale=[0, 5]",
        ["rewards.taste={url: 'http://h/', judge: {model: m, choices: {A: 1, B: 0}}}"],
        "choices is a mapping: they give the score; remove the key, or set rewards.taste.judge.choices to `{}`",
    ),
    (
        "rewards.w.judge.scale=[0, 5]",
        ["rewards.w={url: 'http://h/', judge: {model: m, rubric: {a: {criterion: x}}}}"],
        "rubric is a mapping: each criterion has a scale; remove the key, or set rewards.w.judge.rubric to `null`",
    ),
    (
        "rewards.w.judge.choices={A: 1}",
        ["rewards.w={url: 'http://h/', judge: {model: m, compare: win_rate}}"],
        "compare is win_rate: the judge names the better response",
    ),
    (
        "rewards.w.judge.opponents=3",
        ["rewards.w={url: 'http://h/', judge: {model: m}}"],
        "rewards.w.judge.compare is null",
    ),
    (
        "rewards.w.judge.rubric.a.args={limit: 3}",
        ["rewards.w={url: 'http://h/', judge: {model: m, rubric: {a: {criterion: x}}}}"],
        "rewards.w.judge.rubric.a.function is null",
    ),
    ("reward.disagreement_coef=1", REWARD_MODEL, "reward.members is {}: there is a single reward model"),
    ("rewards.taste.gate=correct", ["rewards.taste={function: contains, weight: 0}"], "rewards.taste.weight is 0"),
    ("rewards.correct.normalize=group", ["algorithm={name: gdpo}", "rewards.b.function=contains"], "gdpo normalises"),
    ("reward_policy.memory_gib=2", REWARD_MODEL, "no reward is a function"),
    ("eval.every=2", ["data.eval=null"], "there is no data.eval"),
    ("train.best_metric=eval/heldout/score", ["data.eval=null"], "there is no data.eval"),
    ("eval.samples_per_prompt=4", [], "greedy responses to one prompt are all equal"),
    ("data.system_prompt=hello", ["data.apply_chat_template=false"], "data.apply_chat_template is false"),
    ("train.min_lr_ratio=0.1", [], "train.lr_schedule is constant"),
    ("train.betas=[0.8, 0.9]", [GRPO, ADAFACTOR, "cluster.roles.policy.zero_stage=0"], "adafactor: it has no moments"),
    ("train.lr_cycles=3", ["train.lr_schedule=cosine"], "train.lr_schedule is cosine"),
    ("train.lr_decay_ratio=0.2", ["train.lr_schedule=linear"], "train.lr_schedule is linear"),
    ("tracking.wandb_project=p", [], "tracking.wandb is off"),
    ("tracking.wandb_entity=team", [], "tracking.wandb is off"),
    ("tracking.wandb_group=g", [], "tracking.wandb is off"),
    ("tracking.wandb_tags=[a]", [], "tracking.wandb is off"),
    ("tracking.wandb_checkpoints=true", [], "tracking.wandb is off"),
    ("cluster.object_store_gib=2", ["cluster.address=auto"], "cluster.address is auto: its size is that of `ray start"),
    ("cluster.roles.rollout.gpu_memory_utilization=0.5", [], "cluster.device is cpu"),
    ("cluster.roles.rollout.enforce_eager=true", [], "cluster.device is cpu"),
    ("cluster.roles.rollout.kv_cache_gib=2", [CUDA], "cluster.device is cuda"),
    ("cluster.roles.policy.threads=2", [CUDA], "cluster.device is cuda"),
    ("data.max_sequence_tokens=100", [], "algorithm ppo samples its training data"),
    ("data.max_unusable_fraction=0.1", [], "algorithm ppo skips only prompts that are too long"),
    ("data.train={one: {source: a.jsonl, weight: 2}}", [], "there is no other set to mix it with"),
    ("cluster.roles.critic.cpus=1", [], "it uses what policy reserves"),
    ("cluster.roles.critic.cpus=2", [], "it uses what policy reserves"),
    ("cluster.roles.reward.cpus=2", [], "it uses what rollout reserves"),
    ("cluster.roles.reward.node_labels={pool: a}", [], "it uses what rollout reserves"),
]


@pytest.mark.parametrize(("override", "others", "why"), INERT)
def test_a_key_without_effect_is_refused(override: str, others: list[str], why: str) -> None:
    message = refusal(ONLINE, [*others, override])
    assert message.startswith(f"argument {override!r}: ")
    assert message.count("has no effect here: ") == 1
    assert why in message
    assert "; remove the key, or " in message
    changed(ONLINE, others)


OF_ROLLOUTS = (
    "rollouts.top_p=0.9 rewards.correct.function=f reward_policy.on_error=drop reference.model=a/b reward.model=a/b "
    "critic.model=a/b data.max_prompt_tokens=5 data.curriculum.low=0.2 train.epochs_per_batch=2 eval.temperature=0.5 "
    "eval.samples_per_prompt=2 tracking.samples_per_step=3 cluster.weight_sync=shm cluster.roles.rollout.engines=2 "
    "cluster.roles.reward.workers=2"
)


@pytest.mark.parametrize("override", OF_ROLLOUTS.split())
def test_supervised_runs_take_no_keys_of_rollouts(override: str) -> None:
    assert "has no effect here: " in refusal(SFT, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference=null", "critic=null", "data.system_prompt=null"],  # null: there is none
        ["cluster.roles.rollout.tensor_parallel=1"],
        # defaults, equal to what the run does
        ["rollouts.weight_updates=between_batches", "rollouts.kv_after_update=recompute", "train.lr_cycles=2"],
        [GRPO, "cluster.roles.critic={workers: 1, cpus: 1}", "algorithm.kl.estimator=k3", "train.min_lr_ratio=0"],
        [LORA, "reference.model=another/model", "cluster.roles.reference.workers=1"],
        [LORA, "policy.adapter=a", "reference.model=some/model"],  # without the adapter
        ["policy.lora={quantize: nf4}", "reference.model=some/model"],  # in full precision
        [LORA, "policy.adapter=a", "policy.lora.lora_plus_ratio=16", "policy.lora.quantize=nf4"],
        ["policy.lora={dora: true, rslora: true, layers: [0, 1], quantize: nf4}"],
        [CUDA, "cluster.roles.rollout.tensor_parallel=2"],  # reward functions beside it need no GPU
        [CUDA, "cluster.weight_sync=ipc", "cluster.roles.rollout.colocate_with=policy"],
        [WHOLE_BATCH, "train.epochs_per_batch=2", "algorithm.clip_low=0.1"],
        [WHOLE_BATCH, "algorithm.correction={mode: bypass}", "algorithm.clip_low=0.1"],
        ["algorithm.correction={mode: policy_gradient}", "algorithm.value_clip=0.1"],  # the critic has its own clip
        ["algorithm={name: topr, correction: {mode: bypass}}"],
        ["algorithm={name: oapl, correction: {mode: bypass}}", WHOLE_BATCH],
        ["algorithm={name: reinforce, baseline: response_mean, correction: {preset: binary_trust_region}}"],
        ["algorithm={name: gpg, correction: {preset: m2po}}"],
        ["algorithm={name: gpg, correction: {preset: bypass_clip_k3_rs}}"],  # the correction rejects responses
        ["data.curriculum={}", "data.train={task: running_totals, size: 79}"],
        ["data.curriculum={}", "data.train={task: running_totals, size: 160}", "reward_policy.on_error=drop"],
        ["data.curriculum={}"],  # the size of a file is unknown before it is read
        ["algorithm={name: cispo, max_ratio: 3}"],
        ["algorithm={name: gspo, dual_clip: 3}"],
        ["algorithm={name: dapo, overlong: {buffer: 50}}"],
        ["algorithm={name: clip_cov, fraction: 0.1}", WHOLE_BATCH],
        ["algorithm={name: grpo, kl: {coef: 0.1, estimator: k1_straight_through}}"],
        ["algorithm={name: grpo, top_entropy_fraction: 0.2, advantage_clip: 3}", WHOLE_BATCH],
        ["algorithm={name: grpo, entropy: {adaptive: {target: 0.3}}}"],
        ["algorithm={name: reinforce}", "rollouts.samples_per_prompt=1", "rollouts.prompts_per_step=32"],
        ["algorithm={name: reinforce_plus_plus}", "rollouts.samples_per_prompt=1", "rollouts.prompts_per_step=32"],
        ["train.max_tokens_per_microbatch=150"],  # 100 + 50: just enough
        [GRPO, "rollouts.samples_per_prompt=2"],
        ["cluster.roles.policy.workers=16"],  # one sequence each
        ["cluster.roles.policy={workers: 32, sequence_parallel: 2}"],  # 16 data-parallel ranks
        ["cluster.roles.policy.workers=2", "cluster.roles.critic={workers: 2, sequence_parallel: 2}"],
        ["train.warmup_steps=19"],
        ["algorithm.critic_warmup_steps=9"],
        ["cluster.roles.policy.workers=2", "cluster.roles.rollout={engines: 2, colocate_with: policy}"],
        ["train.best_metric=-eval/heldout/response_tokens"],
        [
            "rewards.correct={url: 'http://h/', token_env: T, gate: taste, normalize: group, only: {kind: [a, 1]}}",
            "rewards.taste={url: 'https://h/v1', judge: {model: m}, http: {timeout_s: 5}}",
        ],
    ],
)
def test_a_key_with_an_effect_passes(overrides: list[str]) -> None:
    changed(ONLINE, overrides)


def test_a_role_of_rollouts_in_a_supervised_run() -> None:
    message = refusal(SFT, ["cluster.roles.reference.workers=2"])
    assert "this run starts no reference role; remove the key, or choose an algorithm that samples responses" in message
