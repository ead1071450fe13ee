"""The resolved file has only the effective keys, loads to the same tree, and is compared without its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.files.differences import changes, differences, portable
from rlhf.config.files.dump import dump_masked_yaml, dump_yaml
from rlhf.config.files.load import LoadedConfig, load
from rlhf.config.schema.stages import Stage

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


PIPELINE = """
run: {name: demo, dir: %s}
data: {train: x.jsonl}
train: {steps: 2, lr: 1.0e-5, sequences_per_update: 2, max_tokens_per_microbatch: 2048}
stages:
  sft:
    policy: {model: tiny:llama}
    algorithm: {name: sft}
  again:
    policy: {model: stage:sft}
    algorithm: {name: sft}
  soup:
    merge: {method: linear, models: {a: {model: stage:sft}, b: {model: stage:again}}}
  measured:
    evaluate: {model: stage:soup, data: y.jsonl, rewards: {right: {function: exact_match}}}
"""


def stages(folder: Path, *overrides: str, where: str = "out") -> dict[str, Stage]:
    path = folder / "run.yaml"
    path.write_text(PIPELINE % where)
    return dict(load(path, overrides).stages)


def resolved(folder: Path, stage: Stage) -> Stage:
    """Return a stage as read from the run's folder."""
    path = folder / "config.resolved.yaml"
    path.write_text(dump_yaml(stage))
    (found,) = load(path).stages.values()
    return found


def test_trees_differ_in_their_leaves() -> None:
    there: dict[str, Any] = {"a": {"b": 1, "c": None}, "d": [1], "lora": {"rank": 8}}
    assert list(differences(there, {"a": {"b": 1}, "d": [1], "lora": {"rank": 8}})) == []
    here: dict[str, Any] = {"a": {"b": 2, "e": "x"}, "d": [2], "lora": None}
    assert list(differences(there, here)) == [
        "a.b is 1 there and 2 here",
        "a.e is null there and 'x' here",
        "d is [1] there and [2] here",
        "lora is a mapping there and null here",
    ]


def test_a_path_in_the_run_is_the_same_after_a_move() -> None:
    tree = {"model": "runs/demo/models/tiny", "n": 1, "other": ["runs/demo2/x", str(Path("runs/demo/y").absolute())]}
    expected = {"model": "<run>/models/tiny", "n": 1, "other": ["runs/demo2/x", "<run>/y"]}
    assert portable(tree, Path("runs/demo")) == expected


def test_no_stage_has_changed_where_nothing_or_its_place_did(tmp_path: Path) -> None:
    moved = stages(tmp_path, where="elsewhere/out")
    for name, stage in stages(tmp_path).items():
        assert changes(resolved(tmp_path, stage), stage) == []
        assert changes(resolved(tmp_path, stage), moved[name]) == []


@pytest.mark.parametrize(
    ("stage", "override", "expected"),
    [
        ("sft", "train.steps=500", ["train.steps is 2 there and 500 here"]),
        ("sft", "policy.lora={rank: 4}", ["policy.lora is null there and a mapping here"]),
        ("sft", "run.seed=1", ["run.seed is 0 there and 1 here"]),
        ("sft", "tracking.wandb=offline", []),
        ("sft", "train.checkpoint_every=1", []),
        ("sft", "cluster.roles.policy.cpus=0.5", []),
        ("again", "stages.again.policy.model=stage:sft", []),
        (
            "again",
            "stages.again.policy.model=tiny:llama",
            ["policy.model is '<run>/sft/final' there and 'tiny:llama' here"],
        ),
        (
            "soup",
            "stages.soup.merge.models.a.weight=0.25",
            ["stages.soup.merge.models.a.weight is 1.0 there and 0.25 here"],
        ),
        (
            "measured",
            "stages.measured.evaluate.data=z.jsonl",
            ["stages.measured.evaluate.data is 'y.jsonl' there and 'z.jsonl' here"],
        ),
    ],
)
def test_what_matters_has_changed(tmp_path: Path, stage: str, override: str, expected: list[str]) -> None:
    made, now = stages(tmp_path)[stage], stages(tmp_path, override)[stage]
    assert changes(resolved(tmp_path, made), now) == expected


def test_a_secret_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    now = stages(tmp_path, "data.system_prompt=use 0123456789abcdef")["sft"]
    there = stages(tmp_path, "data.system_prompt=use ***")["sft"]
    assert changes(resolved(tmp_path, there), now) == []
