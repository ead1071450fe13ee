"""Converted examples of TRL, verl and OpenRLHF really train, on rows in the form of the other framework.

Model, data, sizes and devices are reduced on the command line; the remaining keys come from the conversion.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

import rlhf
from tests.integration.recipes import rows

HERE = (
    "policy.model=tiny:llama", "policy.dtype=float32", "policy.gradient_checkpointing=false", "cluster.device=cpu",
    "cluster.roles={}", "cluster.object_store_gib=0.25", "cluster.start_timeout_s=200", "tracking.wandb=off",
    "data.eval=null", "eval={}", "train.steps=2", "train.checkpoint_every=2", "train.sequences_per_update=8",
)  # fmt: skip
ONLINE = ("train.epochs=null", "rollouts.prompts_per_step=4", "rollouts.max_new_tokens=4")
SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(1, 7) for b in range(1, 7)]


def trained(folder: Path, framework: str, script: str, *overrides: str) -> list[dict[str, float]]:
    """Return the metrics of a converted run."""
    (folder / "run.sh").write_text(script, encoding="utf-8")
    (folder / "run.yaml").write_text(rlhf.convert(folder / "run.sh", framework).yaml, encoding="utf-8")  # type: ignore[arg-type]
    named = (f"run.dir={folder}", "run.name=converted", *HERE, *overrides)
    rlhf.train(folder / "run.yaml", named, quiet=True)
    assert (folder / "converted/final/config.json").exists() or (
        folder / "converted/final/adapter_config.json"
    ).exists()
    return rows(folder / "converted")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dpo_with_an_adapter_from_trl(tmp_path: Path, ray_local: None) -> None:
    pairs = [{"prompt": sum_, "chosen": right, "rejected": right + "0"} for sum_, right in SUMS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    script = (
        "accelerate launch --num_processes 1 trl/scripts/dpo.py --model_name_or_path some/model --beta 0.3 "
        f"--dataset_name {tmp_path}/pairs.jsonl --per_device_train_batch_size 4 --max_length 64 --max_steps 100 "
        "--learning_rate 1e-3 --use_peft --lora_r 4 --lora_alpha 8 --output_dir out --report_to none"
    )
    metrics = trained(tmp_path, "trl", script, "data.apply_chat_template=false")
    assert [row["step"] for row in metrics][-1] == 2
    resolved = (tmp_path / "converted/config.resolved.yaml").read_text(encoding="utf-8")
    assert "rank: 4" in resolved
    assert "beta: 0.3" in resolved


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_grpo_from_verl_on_its_parquet_file(tmp_path: Path, ray_local: None) -> None:
    table = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": sum_}],
            "reward_model": {"style": "rule", "ground_truth": right},
            "extra_info": {"index": index},
        }
        for index, (sum_, right) in enumerate(SUMS)
    ]
    pandas.DataFrame(table).to_parquet(tmp_path / "sums.parquet")
    script = f"""
N=4
python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files={tmp_path}/sums.parquet \\
    data.train_batch_size=64 data.max_prompt_length=128 data.max_response_length=32 \\
    data.filter_overlong_prompts=True actor_rollout_ref.model.path=some/model actor_rollout_ref.rollout.n=$N \\
    actor_rollout_ref.actor.optim.lr=1e-4 actor_rollout_ref.actor.ppo_mini_batch_size=32 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=$((N * 2)) actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.rollout.name=vllm trainer.logger=console
"""
    metrics = trained(tmp_path, "verl", script, *ONLINE)
    assert metrics[-1]["step"] == 2
    assert "rewards/correct/mean" in metrics[-1]
    assert any("kl_ref" in name for name in metrics[-1]), "the penalty of use_kl_loss needs a reference"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_group_norm_from_openrlhf_with_a_reward_function(tmp_path: Path, ray_local: None) -> None:
    lines = [json.dumps({"question": sum_, "label": right}) for sum_, right in SUMS]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code = "def reward_func(prompt, response, *, answer):\n    return float(answer in response)\n"
    (tmp_path / "reward.py").write_text(code, encoding="utf-8")
    script = (
        "ray job submit -- python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path some/model "
        f"--data.prompt_dataset {tmp_path}/sums.jsonl --data.input_key question --data.label_key label "
        f"--reward.remote_url {tmp_path}/reward.py --algo.advantage.estimator group_norm --actor.adam.lr 1e-4 "
        "--rollout.n_samples_per_prompt 4 --data.max_len 256 --rollout.max_new_tokens 32 --algo.kl.use_loss "
        "--algo.kl.estimator k3 --train.micro_batch_size 4 --train.colocate_all --vllm.num_engines 1 "
        "--actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --algo.advantage.is_correction_enable"
    )
    metrics = trained(tmp_path, "openrlhf", script, *ONLINE)
    assert metrics[-1]["step"] == 2
    assert "rewards/custom/mean" in metrics[-1]
