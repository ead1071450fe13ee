"""The resolved file loads to the same tree. Effective keys are in the file, and keys without effect are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlhf.config.files.dump import dump_masked_yaml, dump_yaml
from rlhf.config.files.load import LoadedConfig, load

BASE = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: ppo}
data: {train: prompts.jsonl}
rollouts: {}
rewards: {correct: {function: math_answer, args: {deep: [1, {a: null}], text: "a: b"}}}
train: {steps: 10, lr: 1e-6, sequences_per_update: 128}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(BASE)
    return tmp_path / "run.yaml"


def reload(tmp_path: Path, text: str) -> LoadedConfig:
    path = tmp_path / "config.resolved.yaml"
    path.write_text(text)
    return load(path)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm={name: grpo}"],
        ["algorithm={name: sft}", "rollouts=null", "rewards={}"],
        ["data.train={a: {source: x, weight: 3}, b: {source: {task: t, size: 3}}}"],
        ["data.train={a: {source: x}}"],
        ["policy.lora={}", "algorithm.kl.coef=0.2"],
        ["algorithm.kl={coef: 0}"],
        ["algorithm.correction={preset: geo_rs_token_tis, max_ratio: 3}"],
        ["algorithm.correction={preset: bypass_pg_geo_rs}"],
        ["algorithm.correction={mode: bypass, reject: {token_k1: [null, 0.5], sequence_max_k3: 1}}"],
        ["train.sequences_per_update=256"],
        ["rewards={taste: {role: reward}}", "reward.model=a/b"],
        ["rewards.taste={url: 'http://h/v1', judge: {model: m, choices: {A: 1}}, normalize: group, only: {k: [a, 1]}}"],
        ["reward_policy.on_error=drop", "tracking.wandb=offline", "train.lr_schedule=cosine"],
        ["data.eval={task: t, size: 3, args: {x: off}}", "eval={temperature: 0.5, samples_per_prompt: 3}"],
        ["data.eval={a: x.jsonl, b: {task: t, size: 3}}", "data.columns={prompt: question}"],
        ["cluster={device: cuda, address: auto, roles: {policy: {workers: 2, offload: [optimizer]}}}"],
        ["rollouts.stop=['off', '1e-6', '007', \"\\n\", ' #', '~']", "run.name=a/b", "data.system_prompt='null'"],
    ],
)
def test_the_resolved_file_loads_to_the_same_tree(tmp_path: Path, file: Path, overrides: list[str]) -> None:
    (config,) = load(file, overrides).stages.values()
    text = dump_yaml(config)
    (again,) = reload(tmp_path, text).stages.values()
    assert again == config
    assert dump_yaml(again) == text == dump_yaml(load(file, overrides))


def test_defaults_are_written_out_and_keys_without_effect_are_not(file: Path) -> None:
    tree = yaml.safe_load(dump_yaml(load(file, ["algorithm={name: grpo}"]).stages["demo"]))
    assert tree["train"]["weight_decay"] == 0.0
    assert tree["rollouts"]["samples_per_prompt"] == 4
    assert tree["cluster"]["roles"]["rollout"]["kv_cache_gib"] == 1
    assert not {"critic", "eval"} & tree.keys()
    assert "estimator" not in tree["algorithm"]["kl"]
    assert "gpu_memory_utilization" not in tree["cluster"]["roles"]["rollout"]


def test_a_masked_secret_is_a_yaml_value(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "a-long-secret")
    words = ["data.system_prompt=a-long-secret", "tracking={wandb: offline, wandb_project: of a-long-secret}"]
    words.append("run.mirror=local://user:verysecret@/mirror")
    (run,) = reload(tmp_path, dump_masked_yaml(load(file, words))).runs.values()
    assert run.data.system_prompt == "***"
    assert run.tracking.wandb_project == "of ***"
    assert run.run.mirror == "local://***@/mirror"
