"""Every relation and every key without effect: exit code 2 and a message that names key, values, rule and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

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


RELATIONS = {
    # 8 * 4 = 32 responses; 32 is no multiple of 12, and the largest divisor of 32 below 12 is 8
    "minibatches divide the batch": (
        ["train.sequences_per_update=12"],
        "train.sequences_per_update: is 12 and must divide rollouts.prompts_per_step * rollouts.samples_per_prompt = "
        "8 * 4 = 32; 8 would fit",
    ),
    "a minibatch is no larger than the batch": (
        ["train.sequences_per_update=64"],
        "has only rollouts.prompts_per_step",
    ),
    "the longest sequence fits": (
        ["train.max_tokens_per_microbatch=149"],
        "is 149 and must hold the longest sequence: data.max_prompt_tokens + rollouts.max_new_tokens = 100 + 50 = 150",
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
        "rollouts.samples_per_prompt: is 1, but grpo compares a prompt's responses",
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
        "train.sequences_per_update: is 16, but a step has only 8 pairs, one a prompt",
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
        "rollouts.samples_per_prompt: is 1, but online_dpo compares a prompt's responses",
    ),
    "pairs have no advantages": (
        [*PAIRS, "algorithm.clip_low=0.1"],
        "algorithm.clip_low: is a key of `ppo` or `grpo`; `online_dpo` has beta",
    ),
    "pairs have no penalty": ([*PAIRS, "algorithm.kl.coef=0.1"], "algorithm.kl: is a key of `ppo` or `grpo`"),
    # 10 steps * 8/8 updates = 10
    "the warm-up ends with pairs too": (
        [*PAIRS, "train.warmup_steps=10"],
        "is 10 and must be below the run's 10 optimizer steps",
    ),
    "a reference does not become a policy with an adapter": (
        [*PAIRS, "algorithm.reference_every=2", LORA],
        "algorithm.reference_every: is 2, but the reference does not become a policy with policy.lora",
    ),
    "an adaptive coefficient starts above 0": (
        ["algorithm.kl={coef: 0, adaptive: {target: 1}}"],
        "algorithm.kl.adaptive: multiplies algorithm.kl.coef, and 0 stays 0",
    ),
    "rollouts are there": (["rollouts=null"], "rollouts: is missing: algorithm ppo samples responses"),
    "a reward is there": (["rewards={}"], "rewards: is missing"),
    "a reward counts": (["rewards.correct.weight=0"], "rewards: all have weight 0"),
    "the reward model is there": (
        ["rewards.taste.role=reward"],
        "reward: is missing: rewards.taste has `role: reward`",
    ),
    "score is no reward's name": (["rewards.score.function=f"], "rewards.score: is taken"),
    "a mapping of evaluation sets names one": (["data.eval={}"], "data.eval: is an empty mapping"),
    "the best metric is evaluated": (
        ["train.best_metric=eval/other/score"],
        "train.best_metric: got 'eval/other/score', expected a metric of an evaluation, or one with `-` before it: "
        "eval/heldout/score, eval/heldout/truncated",
    ),
    "a single run has no stages": (
        ["policy.model=stage:sft"],
        "policy.model: got 'stage:sft', but this run is no stage",
    ),
    "a Ray of the run's own is written null": (["cluster.address=local"], "cluster.address: is local; a Ray that is"),
    "secrets stay out": (["rewards.correct.args.api_key=x"], "rewards.correct.args.api_key: looks like a secret"),
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
        "policy.adapter: got 'stage:sft', but this run is no stage",
    ),
    "pissa is no dora": (["policy.lora={init: pissa, dora: true}"], "policy.lora.init: is pissa, but dora takes"),
    "pissa takes whole weights": (
        ["policy.lora={init: pissa, quantize: nf4}"],
        "policy.lora.init: is pissa, which takes weights apart, but policy.lora.quantize",
    ),
    "a module is adapted or trained whole": (
        ["policy.lora={target_modules: [q_proj, o_proj], modules_to_save: [o_proj]}"],
        "policy.lora.modules_to_save: has o_proj, which policy.lora.target_modules adapts",
    ),
    "4 bits are not sharded": (
        ["policy.lora.quantize=nf4", "cluster.roles.policy.zero_stage=3"],
        "cluster.roles.policy.zero_stage: is 3, but DeepSpeed does not shard weights of 4 bits (policy.lora.quantize)",
    ),
    "a critic's neither": (
        ["critic={model: a/b, lora: {quantize: nf4}}", "cluster.roles.critic.zero_stage=3"],
        "cluster.roles.critic.zero_stage: is 3, but DeepSpeed does not shard weights of 4 bits (critic.lora.quantize)",
    ),
    "nccl is for GPUs": (["cluster.weight_sync=nccl"], "cluster.weight_sync: is nccl, which needs cluster.device cuda"),
    "shm is for CPUs": (
        [CUDA, "cluster.weight_sync=shm"],
        "cluster.weight_sync: is shm, which is for cluster.device cpu",
    ),
    "ipc is for shared GPUs": ([CUDA, "cluster.weight_sync=ipc"], "is ipc, which needs engines on the policy's GPUs"),
    "nccl is not for shared GPUs": (
        [CUDA, "cluster.weight_sync=nccl", "cluster.roles.rollout.colocate_with=policy"],
        "is nccl, which cannot join two processes on a GPU",
    ),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_impossible_relation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    overrides, message = RELATIONS[name]
    assert message in refusal(tmp_path, capsys, ONLINE, overrides)


INERT = {
    "critic.model=a/b": ([GRPO], "algorithm grpo has no critic"),
    "cluster.roles.critic.workers=1": ([GRPO], "this run starts no critic role; remove it, or use ppo"),
    "cluster.roles.reference.workers=1": (["algorithm.kl={coef: 0}"], "set algorithm.kl.coef above 0"),
    "reference.model=a/b": (["algorithm.kl={coef: 0}"], "algorithm.kl.coef is 0"),
    "reference={model: some/model}": ([LORA], "the policy with its LoRA adapter off is that very model"),
    "cluster.roles.reference.cpus=2": ([LORA], "the policy with its adapter off is the reference"),
    "policy.lora.rank=8": ([LORA, "policy.adapter=a"], "policy.adapter names an adapter, which has its own"),
    "policy.lora.dora=true": ([LORA, "policy.adapter=a"], "policy.adapter names an adapter, which has its own"),
    "critic.lora.init=pissa": (
        ["critic={model: a/b, lora: {}, adapter: c}"],
        "critic.adapter names an adapter, which has its own",
    ),
    "cluster.roles.reference.cpus=1": ([LORA, "policy.adapter=a"], "this run starts no reference role"),
    "reward.model=a/b": ([], "no reward uses it"),
    "algorithm.reference_every=10": (PAIRS, "before a new reference is read"),
    "algorithm.label_smoothing=0.1": (
        ["algorithm={name: online_dpo, loss: ipo}", "train.sequences_per_update=8"],
        "algorithm.loss ipo does not read it",
    ),
    "cluster.roles.critic.threads=1": (PAIRS, "this run starts no critic role"),
    "cluster.roles.reference.threads=1": ([*PAIRS, LORA], "the policy with its adapter off is the reference"),
    "reward_policy.max_dropped_fraction=0.4": (PAIRS, "reward_policy.on_error is fail"),
    "data.too_long=skip": (PAIRS, "algorithm online_dpo samples what it trains on"),
    "algorithm.kl.estimator=k2": ([GRPO], "algorithm.kl.coef is 0"),
    "algorithm.kl.place=reward": ([GRPO], "algorithm.kl.coef is 0"),
    "algorithm.clip_low=0.1": (["train.sequences_per_update=32"], "every ratio is 1"),
    "algorithm.clip_high=0.1": (["train.sequences_per_update=32"], "every ratio is 1"),
    "algorithm.dual_clip=3": (["train.sequences_per_update=32"], "every ratio is 1"),
    "algorithm.value_clip=0.1": (["train.sequences_per_update=32"], "every ratio is 1"),
    "reward_policy.max_dropped_fraction=0.5": ([], "reward_policy.on_error is fail"),
    "reward_policy.timeout_s=5": (["rewards={taste: {role: reward}}", "reward.model=a/b"], "no reward is a function"),
    "reward_policy.processes=2": (["rewards={taste: {role: reward}}", "reward.model=a/b"], "no reward is a function"),
    "reward_policy.memory_gib=2": (["rewards={taste: {role: reward}}", "reward.model=a/b"], "no reward is a function"),
    "eval.every=2": (["data.eval=null"], "there is no data.eval"),
    "train.best_metric=eval/heldout/score": (["data.eval=null"], "there is no data.eval"),
    "eval.samples_per_prompt=4": ([], "greedy responses to one prompt are all equal"),
    "data.system_prompt=hello": (["data.apply_chat_template=false"], "data.apply_chat_template is false"),
    "train.min_lr_ratio=0.1": ([], "train.lr_schedule is constant"),
    "tracking.wandb_project=p": ([], "tracking.wandb is off"),
    "cluster.object_store_gib=2": (["cluster.address=auto"], "cluster.address names a running Ray"),
    "cluster.roles.rollout.gpu_memory_utilization=0.5": ([], "cluster.device is cpu"),
    "cluster.roles.rollout.enforce_eager=true": ([], "cluster.device is cpu"),
    "cluster.roles.rollout.kv_cache_gib=2": ([CUDA], "cluster.device is cuda"),
    "cluster.roles.policy.threads=2": ([CUDA], "cluster.device is cuda"),
    "data.max_sequence_tokens=100": ([], "algorithm ppo samples what it trains on"),
    "data.too_long=cut": ([], "algorithm ppo samples what it trains on"),
    "data.max_unusable_fraction=0.1": ([], "algorithm ppo samples what it trains on"),
    "data.train={one: {source: a.jsonl, weight: 2}}": ([], "there is no other set to be mixed with"),
    "cluster.roles.critic.cpus=2": ([], "it uses what policy reserves"),
    "cluster.roles.reward.cpus=2": ([], "it uses what rollout reserves"),
}


@pytest.mark.parametrize("override", INERT)
def test_a_key_without_effect_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    others, why = INERT[override]
    message = refusal(tmp_path, capsys, ONLINE, [*others, override])
    assert f"argument {override!r}: " in message
    assert "has no effect here: " in message
    assert why in message
    assert "; remove it, or " in message


@pytest.mark.parametrize("override", INERT)
def test_the_rest_of_such_a_config_passes(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    assert main(["plan", str(path), *INERT[override][0]]) == 0


@pytest.mark.parametrize(
    "override",
    [
        "rollouts.top_p=0.9",
        "rewards.correct.function=f",
        "reward_policy.on_error=drop",
        "reference.model=a/b",
        "reward.model=a/b",
        "critic.model=a/b",
        "data.max_prompt_tokens=5",
        "train.epochs_per_batch=2",
        "eval.temperature=0.5",
        "eval.samples_per_prompt=2",
        "tracking.samples_per_step=3",
        "cluster.weight_sync=shm",
        "cluster.roles.rollout.engines=2",
        "cluster.roles.reward.workers=2",
    ],
)
def test_supervised_runs_take_no_keys_of_rollouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert "has no effect here: " in refusal(tmp_path, capsys, SFT, [override])


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
    "overrides",
    [
        ["reference=null", "critic=null", "data.system_prompt=null"],  # says that there is none, and there is none
        ["cluster.roles.rollout.tensor_parallel=1"],
        [LORA, "reference.model=another/model", "cluster.roles.reference.workers=1"],
        [LORA, "policy.adapter=a", "reference.model=some/model"],  # without the adapter
        ["policy.lora={quantize: nf4}", "reference.model=some/model"],  # in full precision
        [LORA, "policy.adapter=a", "policy.lora.lora_plus_ratio=16", "policy.lora.quantize=nf4"],
        ["policy.lora={dora: true, rslora: true, layers: [0, 1], quantize: nf4}"],
        [CUDA, "cluster.roles.rollout.tensor_parallel=2"],  # reward functions beside it need no GPU
        [CUDA, "cluster.weight_sync=ipc", "cluster.roles.rollout.colocate_with=policy"],
        ["train.sequences_per_update=32", "train.epochs_per_batch=2", "algorithm.clip_low=0.1"],
        ["train.max_tokens_per_microbatch=150"],  # 100 + 50: just enough
        [GRPO, "rollouts.samples_per_prompt=2"],
        ["cluster.roles.policy.workers=16"],  # one sequence each
        ["cluster.roles.policy={workers: 32, sequence_parallel: 2}"],  # 16 data-parallel ranks
        ["cluster.roles.policy.workers=2", "cluster.roles.critic={workers: 2, sequence_parallel: 2}"],
        ["train.warmup_steps=19"],
        ["algorithm.critic_warmup_steps=9"],
        ["cluster.roles.policy.workers=2", "cluster.roles.rollout={engines: 2, colocate_with: policy}"],
        ["train.best_metric=-eval/heldout/response_tokens"],
    ],
)
def test_what_has_an_effect_is_taken(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
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


def test_a_section_without_effect_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(tmp_path, capsys, ONLINE, [GRPO, "cluster.roles.critic.cpus=2"])
    assert message.count("no effect") == 1


def test_a_role_of_rollouts_in_a_supervised_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(tmp_path, capsys, SFT, ["cluster.roles.reference.workers=2"])
    assert "this run starts no reference role; remove it, or choose an algorithm that samples responses" in message
