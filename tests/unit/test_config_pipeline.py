"""Stages share sections of the pipeline. A stage's keys win, and every mistake has a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import load
from rlhf.config.schema.stages import run_folder
from tests.fixtures.configs import file_error

BASE = """\
run: {name: demo, dir: out, seed: 3}
policy: {dtype: float32}
data: {eval: heldout.jsonl}
train: {lr: 1e-3, sequences_per_update: 32, warmup_steps: 5}
rollouts: {prompts_per_step: 16, max_new_tokens: 13}
rewards: {correct: {function: f}}
stages:
  sft:
    policy: {model: "tiny:llama"}
    algorithm: {name: sft}
    data: {train: a.jsonl}
    train: {steps: 100}
  ppo:
    policy: {model: stage:sft}
    algorithm: {name: ppo}
    data: {train: b.jsonl}
    train: {steps: 60, lr: 3e-4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(BASE)
    return path


def test_stages_in_order_each_a_run_of_its_own(file: Path) -> None:
    loaded = load(file)
    assert (loaded.name, loaded.folder, loaded.is_pipeline) == ("demo", Path("out/demo"), True)
    assert list(loaded.stages) == ["sft", "ppo"]
    assert [config.run.name for config in loaded.stages.values()] == ["demo/sft", "demo/ppo"]
    assert [config.run.seed for config in loaded.stages.values()] == [3, 3]
    assert run_folder(loaded.stages["ppo"]) == Path("out/demo/ppo")


def test_own_keys_win_over_shared_ones(file: Path) -> None:
    sft, ppo = load(file).stages.values()
    assert (sft.train.lr, ppo.train.lr) == (1e-3, 3e-4)
    assert sft.train.warmup_steps == ppo.train.warmup_steps == 5
    assert sft.policy.dtype == ppo.policy.dtype == "float32"
    assert sft.data.eval == ppo.data.eval == "heldout.jsonl"


def test_a_shared_section_is_given_to_stages_that_can_use_it(file: Path) -> None:
    sft, ppo = load(file).stages.values()
    assert sft.rollouts is None
    assert sft.rewards == {}
    assert ppo.rollouts.prompts_per_step == 16


def test_a_model_of_an_earlier_stage_is_its_final_folder(file: Path) -> None:
    assert load(file).stages["ppo"].policy.model == "out/demo/sft/final"
    assert load(file, ["run.name=other"]).stages["ppo"].policy.model == "out/other/sft/final"


def test_overrides_of_a_stage_and_of_all(file: Path) -> None:
    sft, ppo = load(file, ["stages.ppo.train.steps=3", "policy.dtype=bfloat16", "train.lr=5"]).stages.values()
    assert (sft.train.steps, ppo.train.steps) == (100, 3)
    assert sft.policy.dtype == ppo.policy.dtype == "bfloat16"
    assert (sft.train.lr, ppo.train.lr) == (5.0, 3e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=3", "train.steps: has no effect: every stage sets its value; write stages.ppo.train.steps"),
        ("critic={model: x}", ""),
        ("reward.model=x", "reward: no stage can use it: no reward uses it"),
        ("cluster.roles.rollout.enforce_eager=true", "cluster.roles.rollout.enforce_eager: no stage can use it"),
        ("stages.ppo.cluster.object_store_gib=2", "is 2.0 here and 1.0 in stage sft: all stages run in one Ray"),
        ("algorithm.clip_low=0.1", "algorithm: belongs in each stage, not at the top: write stages.sft.algorithm"),
        ("stages.sft.run.seed=1", "stages.sft.run: belongs at the top"),
        ("stages.sft.rollouts.top_p=0.5", "stages.sft.rollouts: has no effect here: algorithm sft samples no"),
        ("stages.sft.train.stepz=1", "stages.sft.train.stepz: unknown key; did you mean train.steps?"),
        ("stages.ppo.train.lr=x", "stages.ppo.train.lr: got 'x', expected a number > 0"),
        ("train.warmup_steps=x", "train.warmup_steps: got 'x', expected an integer >= 0"),
        ("trian.lr=1", "trian: unknown key; did you mean train?"),
        ("stages.pp.train.lr=1", "has no stage 'pp'; did you mean ppo?"),
        ("run.name=a/b", "run.name: got 'a/b', expected a name without `/`"),
        ("run.dir=3", "run.dir: got 3, expected a path"),
        ("run=3", "run: got 3, expected a mapping"),
        ("stages=3", "stages: got 3, expected a mapping of stage names"),
        ("stages={a b: {}}", "stages.a b: is not a valid stage name"),
        ("stages={a: 3}", "stages.a: got 3, expected a mapping of sections"),
    ],
)
def test_mistakes(file: Path, override: str, message: str) -> None:
    if override.startswith("stages="):
        file.write_text(BASE[: BASE.index("stages:")] + override.replace("=", ": ", 1))
        assert message in file_error(file)
    elif message:
        (line,) = file_error(file, override).splitlines()
        assert line.startswith(f"argument {override!r}: ")
        assert message in line
    else:
        load(file, [override])


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ("stage:ppo", "stage ppo does not run earlier; earlier stages: sft"),
        ("stage:stf", "there is no stage stf; did you mean stage:sft?"),
        ("stage:other", "there is no stage other; earlier stages: sft"),
    ],
)
def test_a_model_must_come_from_an_earlier_stage(file: Path, model: str, rule: str) -> None:
    message = file_error(file, f"stages.ppo.policy.model={model}")
    assert message == f"argument 'stages.ppo.policy.model={model}': stages.ppo.policy.model: got '{model}', but {rule}"


def test_a_mistake_in_a_shared_section_is_told_once(file: Path) -> None:
    file.write_text(BASE.replace("dtype: float32", "dtype: int8"))
    assert file_error(file) == f"{file}:2: policy.dtype: got 'int8', expected `float32` or `bfloat16`"


def test_a_stage_goes_on_from_the_adapter_of_another(file: Path) -> None:
    changes = ["stages.sft.policy.lora={}", 'stages.ppo.policy={model: "tiny:llama", lora: {}, adapter: "stage:sft"}']
    loaded = load(file, changes)
    assert loaded.stages["ppo"].policy.adapter == "out/demo/sft/final"
    again = file.with_name("again.yaml")
    again.write_text(dump_yaml(loaded))
    assert "adapter: stage:sft" in again.read_text()
    assert load(again).stages == loaded.stages
    assert "stages.ppo.policy.adapter: got 'stage:stf'" in file_error(
        file, changes[0], changes[1].replace("sft", "stf")
    )


def test_a_stage_may_be_the_teacher_of_a_later_one(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    stage = "data: {train: a.jsonl}, train: {steps: 1, lr: 1e-3, sequences_per_update: 2}"
    path.write_text(
        "run: {name: demo, dir: out}\nstages:\n"
        f"  large: {{policy: {{model: a/b}}, algorithm: {{name: sft}}, {stage}}}\n"
        "  small: {policy: {model: a/c}, teacher: {model: stage:large}, algorithm: {name: distillation}, "
        f"{stage}}}\n"
    )
    loaded = load(path)
    small = loaded.stages["small"]
    assert small.teacher.model == "out/demo/large/final"
    assert "model: stage:large" in dump_yaml(loaded)
    path.write_text(path.read_text().replace("stage:large", "stage:lage"))
    assert "stages.small.teacher.model: got 'stage:lage', but there is no stage lage" in file_error(path)
