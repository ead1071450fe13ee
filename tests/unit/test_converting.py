"""Files of TRL, verl and OpenRLHF become runs with the same meaning, and no setting is dropped silently."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf
from rlhf.cli import main
from rlhf.config.mistakes.schema_keys import all_keys
from rlhf.config.mistakes.synonyms import SETTINGS, Framework
from rlhf.config.schema.root import Config
from rlhf.config.yaml_tree import from_yaml
from rlhf.converting import rules
from rlhf.converting.convert import Conversion
from rlhf.converting.shell import commands
from rlhf.errors import UserError

EXAMPLES = from_yaml((Path(__file__).parents[1] / "fixtures/settings_of_examples.yaml").read_text())
COVERED = ("converted", "same", "inert")
VERL = "data.train_files=prompts.parquet actor_rollout_ref.model.path=some/model trainer.experiment_name=run "
OPENRLHF = "--actor.model_name_or_path some/model --data.prompt_dataset owner/prompts --reward.model_name_or_path rm "
TRL = "--model_name_or_path some/model --dataset_name owner/data --output_dir out "
COMMANDS = {
    "verl": "python3 -m verl.trainer.main_ppo {}",
    "openrlhf": "ray job submit -- python3 -m openrlhf.cli.train_{} {}",
    "trl": "trl {} {}",
}


def converted(
    folder: Path, framework: Framework, text: str, overrides: Sequence[str] = (), **options: Any
) -> tuple[dict[str, Any], Conversion]:
    """Return the loaded values of a converted script, and the conversion."""
    (folder / "run.sh").write_text(text)
    result = rlhf.convert(folder / "run.sh", framework, **options)
    (folder / "run.yaml").write_text(result.yaml)
    loaded = rlhf.load_config(folder / "run.yaml", overrides)
    return next(iter(loaded.stages.values())).model_dump(), result


def verl(folder: Path, text: str) -> dict[str, Any]:
    return converted(folder, "verl", COMMANDS["verl"].format(VERL + text))[0]


def openrlhf(folder: Path, text: str, trainer: str = "ppo_ray") -> dict[str, Any]:
    return converted(folder, "openrlhf", COMMANDS["openrlhf"].format(trainer, OPENRLHF + text))[0]


def trl(folder: Path, trainer: str, text: str, **options: Any) -> dict[str, Any]:
    return converted(folder, "trl", COMMANDS["trl"].format(trainer, TRL + text), **options)[0]


def of_example(name: str, folder: Path) -> Conversion:
    framework, trainer = name.split()[:2]
    words = [word(framework, setting, value) for setting, value in EXAMPLES[name].items()]
    trainer = "ppo_ray" if framework == "openrlhf" and trainer != "dpo" else trainer
    command = COMMANDS[framework].format(*([trainer] if framework != "verl" else []), " ".join(words))
    not_named = ["data.train=d.jsonl", "rewards.correct.function=math_answer"] if name == "trl grpo" else []
    return converted(folder, framework, command, not_named)[1]  # type: ignore[arg-type]


def word(framework: str, setting: str, value: Any) -> str:
    """Return a setting as a word of a command."""
    if framework == "verl":
        section = "actor_rollout_ref." if setting.split(".")[0] in ("actor", "rollout", "ref", "model") else ""
        return f"{section}{setting}='{json.dumps(value)}'"
    if isinstance(value, bool):
        return f"--{setting}" if value else f"--no_{setting}"
    return " ".join([f"--{setting}", *(f"'{each}'" for each in (value if isinstance(value, list) else [value]))])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_becomes_a_run_and_each_setting_has_an_outcome(tmp_path: Path, name: str) -> None:
    outcomes = of_example(name, tmp_path).outcomes
    assert outcomes.keys() == EXAMPLES[name].keys()
    assert all(outcome.text for outcome in outcomes.values() if outcome.kind != "converted")
    assert not [setting for setting, outcome in outcomes.items() if outcome.kind == "unknown"]


def test_the_conversion_covers_nine_tenths_of_the_settings_of_ten_examples(tmp_path: Path) -> None:
    """A setting is covered if a key follows from it or if the run here is the same without a key."""
    kinds = [outcome.kind for name in EXAMPLES for outcome in of_example(name, tmp_path).outcomes.values()]
    assert len(EXAMPLES) == 10
    assert len(kinds) == sum(map(len, EXAMPLES.values()))
    assert sum(kind in COVERED for kind in kinds) / len(kinds) >= 0.9


@pytest.mark.parametrize("framework", SETTINGS)
def test_tables_and_rules_name_settings_and_keys_that_exist(framework: Framework) -> None:
    """Each setting that needs a rule has one, and each rule sets a key of the schema."""
    rows = {name: row for row in SETTINGS[framework] for name in row.names}
    assert len(rows) == sum(len(row.names) for row in SETTINGS[framework]), "a name twice"
    assert all(re.fullmatch(r"copy|code|none|same(:.+)?|like:\S+", row.how) for row in SETTINGS[framework])
    assert all(row.how[5:] in rows for row in SETTINGS[framework] if row.how.startswith("like:"))
    assert all(row.note for row in SETTINGS[framework] if row.how.split(":")[0] in ("none", "same", "like"))
    keys = {".".join(key) for key in all_keys(Config)}
    with (Path(rules.__file__).parent / "rules" / f"{framework}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    trees = [ast.parse(text, mode="eval") for rule in table for text in (rule["when"], rule["value"]) if text]
    used = {
        ast.unparse(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)
    }
    unread = [row.names[0] for row in SETTINGS[framework] if row.how == "code" and not {*row.names} & used]
    assert unread == []
    for rule in table:
        key = re.sub(r"^(rewards|data\.columns)\.\w+", r"\1", rule["key"])
        key = key.partition(".engine_args")[0] + ".engine_args" * (".engine_args" in key)
        assert not key or key in keys or f"rewards.*{key[7:]}" in keys, rule
        assert rule["key"] or rule["look"], rule


def test_batches_of_verl_count_prompts_and_the_key_counts_responses(tmp_path: Path) -> None:
    text = (
        "algorithm.adv_estimator=grpo data.train_batch_size=64 actor_rollout_ref.rollout.n=5 "
        "actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 "
        "data.max_prompt_length=100 data.max_response_length=200 actor_rollout_ref.actor.optim.lr_warmup_steps=10"
    )
    run = verl(tmp_path, text)
    assert run["rollouts"]["prompts_per_step"] == 64
    assert run["rollouts"]["samples_per_prompt"] == 5
    assert run["train"]["sequences_per_update"] == 16 * 5
    assert run["train"]["max_tokens_per_microbatch"] == 4 * (100 + 200)
    assert run["train"]["warmup_steps"] == 10 * 64 // 16  # verl counts batches, and a batch has four optimizer steps
    dynamic = " actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9000"
    assert verl(tmp_path, text + dynamic)["train"]["max_tokens_per_microbatch"] == 9000


def test_the_defaults_of_verl_are_converted_too(tmp_path: Path) -> None:
    """The numbers are those of verl's ppo_trainer.yaml."""
    run = verl(tmp_path, "actor_rollout_ref.actor.ppo_epochs=2")
    assert run["algorithm"]["name"] == "ppo"
    assert run["algorithm"]["kl"]["coef"] == 0.0
    assert (run["algorithm"]["lam"], run["algorithm"]["dual_clip"]) == (1.0, 3.0)
    assert (run["rollouts"]["prompts_per_step"], run["rollouts"]["samples_per_prompt"]) == (1024, 1)
    assert (run["rollouts"]["max_new_tokens"], run["train"]["weight_decay"], run["train"]["epochs"]) == (512, 0.01, 30)
    assert run["train"]["checkpoint_every"] == rules.NEVER
    assert run["cluster"]["roles"]["policy"]["workers"] == 8
    assert run["data"]["columns"] == {"messages": "prompt", "answer": "reward_model.ground_truth"}


@pytest.mark.parametrize(
    ("text", "kl"),
    [
        ("actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01", (0.01, "k3", "loss")),
        ("algorithm.use_kl_in_reward=True algorithm.kl_penalty=mse", (0.001, "k2", "reward")),
    ],
)
def test_the_penalty_of_verl_keeps_its_place(tmp_path: Path, text: str, kl: tuple[float, str, str]) -> None:
    penalty = verl(tmp_path, f"algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 {text}")["algorithm"]["kl"]
    assert (penalty["coef"], penalty["estimator"], penalty["place"]) == kl


@pytest.mark.parametrize(("name", "estimator"), [("k1", "k1"), ("k3", "k3"), ("mse+", "k2"), ("low_var_kl+", "k3")])
def test_names_of_estimators_of_verl(tmp_path: Path, name: str, estimator: str) -> None:
    text = "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 algorithm.use_kl_in_reward=True "
    assert verl(tmp_path, f"{text} algorithm.kl_penalty={name}")["algorithm"]["kl"]["estimator"] == estimator
    loss = verl(tmp_path, f"{text} actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=k3+")
    assert loss["algorithm"]["kl"]["estimator"] == "k3_straight_through"


def test_an_estimator_without_a_counterpart_is_named(tmp_path: Path) -> None:
    text = VERL + (
        "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 actor_rollout_ref.actor.use_kl_loss=True "
        "actor_rollout_ref.actor.kl_loss_type=abs"
    )
    outcomes = converted(tmp_path, "verl", COMMANDS["verl"].format(text))[1].outcomes
    assert (outcomes["actor.kl_loss_type"].kind, outcomes["actor.use_kl_loss"].kind) == ("none", "converted")


@pytest.mark.parametrize("mode", ["gspo", "sapo", "geo_mean"])
def test_losses_of_verl_with_a_fixed_aggregation(tmp_path: Path, mode: str) -> None:
    text = "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 actor_rollout_ref.actor.loss_agg_mode=token-mean"
    run = verl(tmp_path, f"{text} actor_rollout_ref.actor.policy_loss.loss_mode={mode}")
    assert run["algorithm"]["aggregation"] == "sequence_mean_token_mean"


def test_the_older_micro_batch_of_verl_counts_all_gpus(tmp_path: Path) -> None:
    text = "data.max_prompt_length=100 data.max_response_length=100 trainer.n_gpus_per_node=4 "
    run = verl(tmp_path, text + "actor_rollout_ref.actor.ppo_micro_batch_size=64")
    assert run["train"]["max_tokens_per_microbatch"] == 64 // 4 * 200


def test_dapo_of_verl(tmp_path: Path) -> None:
    text = (
        "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 data.train_batch_size=32 data.gen_batch_size=64 "
        "actor_rollout_ref.actor.ppo_mini_batch_size=8 algorithm.filter_groups.enable=True "
        "algorithm.filter_groups.max_num_gen_batches=3 actor_rollout_ref.actor.clip_ratio_high=0.28 "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True trainer.save_freq=7 "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.len=128 data.filter_overlong_prompts=True"
    )
    run = verl(tmp_path, text)
    assert run["algorithm"]["name"] == "dapo"
    assert run["algorithm"]["overlong"] == {"buffer": 128, "factor": 1.0}
    assert (run["algorithm"]["clip_low"], run["algorithm"]["clip_high"]) == (0.2, 0.28)
    assert run["rollouts"]["dynamic_sampling"]["max_filtered_fraction"] == 3 * 64 / 32 - 1
    assert (run["data"]["too_long"], run["train"]["checkpoint_every"]) == ("skip", 7)


def test_sft_of_verl_reads_fields_inside_columns(tmp_path: Path) -> None:
    text = (
        "torchrun --nproc_per_node=4 -m verl.trainer.fsdp_sft_trainer data.train_files=a.parquet "
        "model.partial_pretrain=some/model data.prompt_key=extra_info +data.prompt_dict_keys=['question'] "
        "data.response_key=extra_info +data.response_dict_keys=['answer'] data.train_batch_size=32 model.lora_rank=8"
    )
    run = converted(tmp_path, "verl", text)[0]
    assert run["algorithm"]["name"] == "sft"
    assert run["data"]["columns"] == {"prompt": "extra_info.question", "completion": "extra_info.answer"}
    assert run["policy"]["lora"]["rank"] == 8
    assert run["policy"]["lora"]["alpha"] == 16
    assert run["cluster"]["roles"]["policy"]["workers"] == 4


def test_a_yaml_file_of_verl(tmp_path: Path) -> None:
    tree = {
        "hydra": {"searchpath": ["file://x"]},
        "defaults": ["ppo_trainer"],
        "data": {"train_files": ["a.parquet", "b.parquet"], "train_batch_size": 16},
        "algorithm": {"adv_estimator": "rloo"},
        "actor_rollout_ref": {
            "model": {"path": "some/model"},
            "actor": {"ppo_mini_batch_size": 16, "optim": {"lr": 1e-6}},
            "rollout": {"n": 2, "name": "sglang", "response_length": "${data.max_response_length}"},
        },
    }
    (tmp_path / "rloo.yaml").write_text(yaml.safe_dump(tree))
    result = rlhf.convert(tmp_path / "rloo.yaml", "verl")
    values = yaml.safe_load(result.yaml)
    assert values["run"]["name"] == "rloo"
    assert [source["source"] for source in values["data"]["train"].values()] == ["a.parquet", "b.parquet"]
    assert values["train"]["sequences_per_update"] == 32
    assert not [name for name, outcome in result.outcomes.items() if outcome.kind in ("none", "unknown")]


def test_a_path_that_begins_with_a_variable_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(COMMANDS["verl"].format(VERL + "data.val_files=${DATA}/test.parquet"))
    assert yaml.safe_load(rlhf.convert(tmp_path / "run.sh", "verl").yaml)["data"]["eval"] == "${DATA}/test.parquet"


def test_batches_and_the_placement_of_openrlhf(tmp_path: Path) -> None:
    text = (
        "--rollout.batch_size 64 --rollout.n_samples_per_prompt 4 --train.batch_size 32 --train.micro_batch_size 2 "
        "--data.max_len 1024 --rollout.max_new_tokens 256 --algo.advantage.estimator group_norm --train.colocate_all "
        "--actor.num_gpus_per_node 4 --vllm.num_engines 2 --vllm.tensor_parallel_size 2 --ref.num_gpus_per_node 4 "
        "--algo.kl.use_loss --algo.kl.estimator k2 --algo.dynamic_filtering_enable --reward.num_gpus_per_node 4"
    )
    run = openrlhf(tmp_path, text)
    assert (run["rollouts"]["prompts_per_step"], run["train"]["sequences_per_update"]) == (64, 32)
    assert (run["rollouts"]["max_new_tokens"], run["data"]["max_prompt_tokens"]) == (256, 768)
    assert run["train"]["max_tokens_per_microbatch"] == 2 * 1024
    assert run["algorithm"]["name"] == "grpo"
    assert run["algorithm"]["kl"] == {"coef": 0.01, "estimator": "k2", "place": "loss", "adaptive": None}
    rollout = run["cluster"]["roles"]["rollout"]
    assert (rollout["engines"], rollout["tensor_parallel"], rollout["colocate_with"]) == (4, 1, "policy")
    assert run["rollouts"]["dynamic_sampling"]["max_mean"] == 1
    assert run["train"]["betas"] == (0.9, 0.95)  # OpenRLHF's defaults
    assert (run["train"]["warmup_ratio"], run["train"]["min_lr_ratio"], run["train"]["lr_schedule"]) == (
        0.03,
        0.1,
        "cosine",
    )
    assert run["rewards"]["model"]["role"] == "reward"


@pytest.mark.parametrize(
    ("kind", "correction"),
    [
        ("tis", {"weights": "token_truncated", "min_ratio": 0.5, "max_ratio": 5.0}),
        ("icepop", {"weights": "token_masked", "min_ratio": 0.5, "max_ratio": 5.0}),
        ("seq-mask-tis", {"weights": "token_truncated", "min_ratio": 0.0, "max_ratio": 1e6}),
    ],
)
def test_the_correction_of_openrlhf(tmp_path: Path, kind: str, correction: dict[str, Any]) -> None:
    text = f"--algo.advantage.is_correction_enable --algo.advantage.is_correction_type {kind} --train.async_enable"
    run = openrlhf(tmp_path, f"{text} --vllm.num_engines 4")
    given = run["algorithm"]["correction"]
    assert {key: given[key] for key in correction} == correction
    bounds = given["reject"]["geometric_mean_ratio"]
    assert bounds == ((0.5, 5.0) if kind == "seq-mask-tis" else None)
    assert run["rollouts"]["max_staleness"] == 1
    assert run["cluster"]["roles"]["reference"]["colocate_with"] is None


def test_losses_of_openrlhf_average_over_tokens_except_gspo(tmp_path: Path) -> None:
    text = "--rollout.n_samples_per_prompt 4 --algo.advantage.is_correction_enable --algo.advantage.estimator "
    assert openrlhf(tmp_path, text + "rloo")["algorithm"]["aggregation"] == "token_mean"
    gspo = openrlhf(tmp_path, text + "group_norm --actor.policy_loss_type gspo")["algorithm"]
    assert gspo["aggregation"] == "sequence_mean_token_mean"
    assert (gspo["correction"]["mode"], gspo["correction"]["weights"]) == ("bypass", None)


def test_older_options_of_openrlhf_without_dots(tmp_path: Path) -> None:
    text = (
        "--pretrain some/model --prompt_data owner/prompts --remote_rm_url http://127.0.0.1:5000/score "
        "--advantage_estimator rloo --init_kl_coef 0.05 --n_samples_per_prompt 8 --actor_learning_rate 3e-6 "
        "--prompt_max_len 512 --generate_max_len 256 --use_wandb SECRET --wandb_project lessons"
    )
    run, result = converted(tmp_path, "openrlhf", COMMANDS["openrlhf"].format("ppo_ray", text))
    assert (run["algorithm"]["name"], run["algorithm"]["kl"]["coef"]) == ("rloo", 0.05)
    assert (run["data"]["max_prompt_tokens"], run["rollouts"]["max_new_tokens"]) == (512, 256)
    assert run["rewards"]["custom"]["url"] == "http://127.0.0.1:5000/score"
    assert run["tracking"]["wandb"] == "online"
    assert "SECRET" not in result.yaml + "".join(result.remarks)


def test_offline_trainers_of_openrlhf(tmp_path: Path) -> None:
    shared = "--model.model_name_or_path some/model --data.dataset owner/data --train.batch_size 16 --data.max_len 512 "
    text = COMMANDS["openrlhf"].format("dpo", shared + "--model.beta 0.3 --data.chosen_key better --model.ipo_enable")
    run = converted(tmp_path, "openrlhf", text)[0]
    assert (run["algorithm"]["name"], run["algorithm"]["beta"], run["algorithm"]["loss"]) == ("dpo", 0.3, "ipo")
    assert run["data"]["columns"] == {"chosen": "better"}
    assert run["train"]["max_tokens_per_microbatch"] == 2 * 512
    text = COMMANDS["openrlhf"].format("sft", shared + "--data.input_key question --data.output_key answer")
    run = converted(tmp_path, "openrlhf", text)[0]
    assert run["data"]["columns"] == {"prompt": "question", "completion": "answer"}
    text = COMMANDS["openrlhf"].format("rm", shared)
    assert converted(tmp_path, "openrlhf", text)[0]["algorithm"]["name"] == "reward_model"


def test_batches_of_trl_count_responses_of_a_device(tmp_path: Path) -> None:
    text = (
        "--num_processes 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --num_generations 4 "
        "--steps_per_generation 4 --max_steps 100 --save_steps 20 --beta 0.04 --reward_funcs accuracy_reward"
    )
    run = trl(tmp_path, "grpo", text)
    assert run["train"]["sequences_per_update"] == 8 * 2 * 4
    assert run["rollouts"]["prompts_per_step"] == 8 * 4 * 4 // 4
    assert run["train"]["steps"] == 50  # a batch has 128 responses, so two optimizer steps
    assert run["train"]["checkpoint_every"] == 10
    assert run["algorithm"]["kl"] == {"coef": 0.04, "estimator": "k3", "place": "loss", "adaptive": None}
    assert (run["train"]["lr_schedule"], run["run"]["seed"]) == ("linear", 42)  # TRL's defaults
    assert run["rewards"]["accuracy_reward"]["function"] == "math_answer"
    assert run["cluster"]["roles"]["policy"]["workers"] == 4


def test_trackers(tmp_path: Path) -> None:
    tracking = trl(tmp_path, "sft", "--report_to tensorboard mlflow")["tracking"]
    assert (tracking["tensorboard"], tracking["wandb"], tracking["trackers"]) == (True, "off", {"mlflow": {}})
    tracking = verl(tmp_path, """trainer.project_name=sums trainer.logger='["console","wandb","swanlab"]'""")[
        "tracking"
    ]
    assert (tracking["wandb"], tracking["trackers"]) == ("online", {"swanlab": {"project": "sums"}})


def test_the_number_of_gpus_is_asked_for(tmp_path: Path) -> None:
    text = "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_length 512"
    assert trl(tmp_path, "sft", text)["train"]["sequences_per_update"] == 16
    result = converted(tmp_path, "trl", COMMANDS["trl"].format("sft", TRL + text))[1]
    assert any("--gpus N" in remark for remark in result.remarks)
    run = trl(tmp_path, "sft", text, gpus=4)
    assert run["train"]["sequences_per_update"] == 64
    assert run["cluster"]["roles"]["policy"]["workers"] == 4


@pytest.mark.parametrize(
    ("text", "name", "aggregation"),
    [
        ("", "grpo", "token_mean"),
        ("--loss_type grpo", "grpo", "sequence_mean_token_mean"),
        ("--loss_type dr_grpo --scale_rewards none", "grpo", "token_sum_norm"),
        ("--loss_type grpo --importance_sampling_level sequence", "gspo", "sequence_mean_token_mean"),
        ("--loss_type cispo", "cispo", "token_mean"),
    ],
)
def test_losses_of_trl(tmp_path: Path, text: str, name: str, aggregation: str) -> None:
    algorithm = trl(tmp_path, "grpo", f"--reward_funcs accuracy_reward {text}")["algorithm"]
    assert (algorithm["name"], algorithm["aggregation"]) == (name, aggregation)
    assert algorithm.get("std_normalize", True) is ("none" not in text)


def test_ppo_prm_and_bco_of_trl_have_a_place(tmp_path: Path) -> None:
    text = "--total_episodes 1000 --per_device_train_batch_size 10 --num_mini_batches 2 --kl_coef 0.1"
    (tmp_path / "run.sh").write_text(f"accelerate launch --num_processes 2 ppo.py {TRL} {text} --reward_model_path rm")
    result = rlhf.convert(tmp_path / "run.sh", "trl")
    run = yaml.safe_load(result.yaml)
    assert run["algorithm"]["name"] == "ppo"
    assert run["algorithm"]["kl"]["coef"] == 0.1
    assert run["rollouts"] == {
        "temperature": 0.7,
        "prompts_per_step": 20,
        "samples_per_prompt": 1,
        "max_new_tokens": 53,
    }
    assert (run["train"]["sequences_per_update"], run["train"]["steps"], run["train"]["epochs_per_batch"]) == (
        10,
        50,
        4,
    )
    assert run["reward"]["model"] == "rm"
    assert trl(tmp_path, "prm", "")["algorithm"]["name"] == "process_reward_model"
    assert trl(tmp_path, "bco", "--beta 0.2")["algorithm"] == {"name": "kto", "loss": "bco", "beta": 0.2} | {
        "desirable_weight": 1.0, "undesirable_weight": 1.0}  # fmt: skip


SCRIPT = """
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
LENGTH = 256
dataset, held_out = load_dataset("owner/data", split=["train[:5%]", "test[:5%]"])
config = GRPOConfig(output_dir="out/first", max_completion_length=LENGTH, num_generations=4, seed=make_seed())
trainer = GRPOTrainer(model="some/model", reward_funcs=[accuracy_reward, own], args=config, train_dataset=dataset,
                      peft_config=LoraConfig(r=4, lora_alpha=8))
"""


def test_a_python_script_of_trl_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    result = rlhf.convert(tmp_path / "train.py", "trl")
    run = yaml.safe_load(result.yaml)
    assert run["run"] == {"seed": 42, "name": "first", "dir": "out"}
    assert (run["policy"]["model"], run["data"]["train"]) == ("some/model", "owner/data:train")
    assert run["policy"]["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.05}
    assert run["rollouts"]["max_new_tokens"] == 256
    assert run["rewards"]["own"]["function"] == "train.py:own"
    assert "make_seed()" in result.outcomes["seed"].text
    assert any("no key cuts a data set" in remark for remark in result.remarks)
    assert any("signature" in remark for remark in result.remarks)


def test_a_python_script_with_a_subset_and_a_mapping_of_arguments(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        'rows = load_dataset("owner/data", "main", split=[])\nargs = SFTConfig(optim={[]: 1}, **shared)\n'
    )
    outcomes = rlhf.convert(tmp_path / "train.py", "trl").outcomes
    assert {name: outcomes[name].kind for name in ("dataset_config", "optim", "**shared")} == dict.fromkeys(
        ("dataset_config", "optim", "**shared"), "none"
    )


def test_a_configuration_of_trl_and_of_accelerate(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("model_name_or_path: some/model\ndataset_name: owner/data\nmax_length: 256\n")
    (tmp_path / "zero.yaml").write_text("num_processes: 2\ndeepspeed_config: {zero_stage: 3}\n")
    text = "accelerate launch --config_file zero.yaml trl/scripts/sft.py --config sft.yaml --max_length 512"
    run = converted(tmp_path, "trl", text)[0]
    assert run["data"]["max_sequence_tokens"] == 512
    assert run["cluster"]["roles"]["policy"]["workers"] == 2
    assert run["cluster"]["roles"]["policy"]["zero_stage"] == 3
    with pytest.raises(UserError, match="name the method with --method: grpo, rloo, sft"):
        rlhf.convert(tmp_path / "sft.yaml", "trl")
    assert "name: sft" in rlhf.convert(tmp_path / "sft.yaml", "trl", method="sft").yaml


def test_data_types_of_trl(tmp_path: Path) -> None:
    assert trl(tmp_path, "sft", "--bf16 true --fp16 false")["policy"]["dtype"] == "bfloat16"
    assert trl(tmp_path, "sft", "--bf16 false --dtype float32")["policy"]["dtype"] == "float32"
    assert trl(tmp_path, "sft", "--dtype bfloat16 --bf16 false")["policy"]["dtype"] == "bfloat16"


def test_settings_of_trl_with_values_without_a_counterpart_are_named(tmp_path: Path) -> None:
    text = (
        "--save_strategy epoch --eval_strategy epoch --deepspeed config.json --importance_sampling_level sequence "
        "--loss_type cispo --lr_scheduler_kwargs '{num_cycles: 2}' --reward_funcs accuracy_reward"
    )
    outcomes = converted(tmp_path, "trl", COMMANDS["trl"].format("grpo", TRL + text))[1].outcomes
    names = ("save_strategy", "eval_strategy", "deepspeed", "importance_sampling_level", "lr_scheduler_kwargs")
    assert {name: outcomes[name].kind for name in names} == dict.fromkeys(names, "none")
    smallest = "--learning_rate 1e-5 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{min_lr: 1.0e-6}'"
    assert trl(tmp_path, "sft", smallest)["train"]["min_lr_ratio"] == pytest.approx(0.1)


def test_the_gpus_of_all_nodes_are_counted(tmp_path: Path) -> None:
    text = f"torchrun --nproc_per_node=8 --nnodes 2 sft.py {TRL} --per_device_train_batch_size 1"
    assert converted(tmp_path, "trl", text)[0]["train"]["sequences_per_update"] == 16


def test_a_script_is_expanded_without_running_it(tmp_path: Path) -> None:
    text = f"""
    set -x; touch {tmp_path}/ran
    GPUS=${{GPUS:-4}}   # devices
    export SIZE=$((GPUS * 2 + 1))
    FOLDER="${{ROOT:-/data}}/sets"
    ARGS=(
       --one "$FOLDER/a b"
       # --left out
       --two ${{SIZE}}
    )
    ARGS+=(--more 1)
    read -r -d '' command <<EOF
    tool --x 1 \\
       --y 2
EOF
    EMPTY=${{EMPTY:-}}
    run ${{ARGS[@]}} --three $1 $@ > log 2>&1 | tee file
    other "${{ARGS[@]}}" "${{EMPTY:-5}}"
    $command
    bash -c "inner --z 3"
    """
    found = list(commands(text.replace("\n    ", "\n")))
    assert ["run", "--one", "/data/sets/a b", "--two", "9", "--more", "1", "--three", "${1}"] in found
    assert ["other", "--one", "/data/sets/a b", "--two", "9", "--more", "1", "5"] in found
    assert ["tool", "--x", "1", "--y", "2"] in found
    assert ["inner", "--z", "3"] in found
    assert not (tmp_path / "ran").exists()


def test_a_script_with_branches_and_quoted_arrays_of_verl(tmp_path: Path) -> None:
    text = """
    DATA=(
        data.train_files="['a.parquet', 'b.parquet']"
        data.train_batch_size=${BATCH:-64}
    )
    REWARD=(reward.custom_reward_function.path=own.py)
    if [ -n "$BATCH" ]; then
        DATA+=(data.max_prompt_length=99)
    fi
    python3 -m verl.trainer.main_ppo \\
        "${DATA[@]}" \\
        "${REWARD[@]}" actor_rollout_ref.model.path=some/model "$@"
    """
    run, result = converted(tmp_path, "verl", text.replace("\n    ", "\n"))
    assert (run["rollouts"]["prompts_per_step"], run["data"]["max_prompt_tokens"]) == (64, 99)
    assert [*run["rewards"]] == ["custom"]
    assert any("all branches are read" in remark for remark in result.remarks)


def test_a_variable_without_a_value_is_named(tmp_path: Path) -> None:
    text = "WORK=$(pwd)\n" + COMMANDS["trl"].format("sft", TRL + "--output_dir ${WORK}/out --run_name $1")
    result = converted(tmp_path, "trl", text)[1]
    assert any(remark.startswith("${1}, ${WORK}: the file gives no value") for remark in result.remarks)


def test_an_algorithm_without_a_counterpart_is_left_to_the_user(tmp_path: Path) -> None:
    text = COMMANDS["verl"].format(VERL + "algorithm.adv_estimator=novel")
    (tmp_path / "run.sh").write_text(text)
    result = rlhf.convert(tmp_path / "run.sh", "verl")
    assert "name" not in yaml.safe_load(result.yaml)["algorithm"]
    assert "algorithm.name: got 'novel'" in result.outcomes["algorithm.adv_estimator"].text
    assert any(remark.startswith("algorithm") and "missing" in remark for remark in result.remarks)


def test_a_setting_that_changes_nothing_here_is_told_from_one_that_is_lost(tmp_path: Path) -> None:
    text = VERL + (
        "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=4 critic.optim.lr=1e-5 nonsense.key=3 "
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2 data.train_batch_size=ten "
        "actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.strategy=megatron"
    )
    (tmp_path / "run.sh").write_text(COMMANDS["verl"].format(text))
    outcomes = rlhf.convert(tmp_path / "run.sh", "verl").outcomes
    kinds = {name: outcome.kind for name, outcome in outcomes.items()}
    assert kinds["critic.optim.lr"] == "inert"
    assert kinds["nonsense.key"] == "unknown"
    assert kinds["rollout.tensor_model_parallel_size"] == "none"
    assert kinds["data.train_batch_size"] == "none"
    assert kinds["model.use_remove_padding"] == "same"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.sh", "echo hello", "no command that starts trl"),
        ("run.py", "print(1)", "calls no Config and no Trainer of TRL"),
        ("run.py", "def broken(", "run.py:1: is not Python"),
        ("run.py", "x = '\0'", "is not Python"),
        ("run.yaml", "- a list", "must hold a mapping of sections"),
        ("run.sh", "trl sft --config gone.yaml", "reads --config gone.yaml, and there is no such file"),
        ("run.sh", "accelerate launch own_script.py --learning_rate 1", "name the method with --method:"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        rlhf.convert(tmp_path / name, "trl")


def test_the_command_writes_yaml_and_lists_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "run.sh", tmp_path / "out.yaml"
    file.write_text(COMMANDS["trl"].format("dpo", TRL + "--eos_token x --max_length 256"))
    assert main(["convert", "--from", "trl", str(file)]) == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["algorithm"]["name"] == "dpo"
    assert "eos_token" in shown.err
    assert "# No counterpart: eos_token" in shown.out
    assert main(["convert", "--from", "trl", str(file), "--output", str(out)]) == 0
    assert out.read_text() == shown.out
    capsys.readouterr()
    assert main(["convert", "--from", "trl", str(file), "--output", str(out)]) == 2
    assert "cannot be written: File exists" in capsys.readouterr().err
    assert main(["convert", "--from", "trl", str(tmp_path / "gone.sh")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["convert", "--from", "trl", str(file), "--gpus", "0"]) == 2
    assert main(["convert", str(file)]) == 2
