"""Stages: what is shared, what is a stage's own, and what each mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.dump import dump_yaml
from rlhf.config.evaluate import EvaluationStage
from rlhf.config.load import load
from rlhf.config.stages import MergeStage, result_of, run_folder
from rlhf.errors import UserError

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


def error(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value)


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
    assert ppo.rollouts is not None
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
        ("train.steps=3", "train.steps: has no effect: every stage sets its own; write stages.ppo.train.steps"),
        ("critic={model: x}", ""),
        ("reward.model=x", "reward: no stage can use it: no reward uses it"),
        (
            "cluster.roles.rollout.enforce_eager=true",
            "cluster.roles.rollout.enforce_eager: no stage can use it: cluster.device is cpu",
        ),
        ("stages.ppo.cluster.object_store_gib=2", "is 2.0 here and 1.0 in stage sft: all stages run in one Ray"),
        ("algorithm.clip_low=0.1", "algorithm: stands in each stage, not at the top: write stages.sft.algorithm"),
        ("stages.sft.run.seed=1", "stages.sft.run: stands at the top"),
        (
            "stages.sft.rollouts.top_p=0.5",
            "stages.sft.rollouts: has no effect here: algorithm sft samples no responses",
        ),
        ("stages.sft.train.stepz=1", "stages.sft.train.stepz: unknown key; did you mean train.steps?"),
        ("stages.ppo.train.lr=x", "stages.ppo.train.lr: got 'x', expected a number > 0"),
        ("train.warmup_steps=x", "train.warmup_steps: got 'x', expected an integer >= 0"),
        ("trian.lr=1", "trian: unknown key; did you mean train?"),
        ("run.name=a/b", "run.name: got 'a/b', expected a name without `/`"),
        ("run.dir=3", "run.dir: got 3, expected a path"),
        ("run=3", "run: got 3, expected a mapping"),
        ("stages=3", "stages: got 3, expected a mapping of stage names"),
        ("stages={a b: {}}", "stages.a b: is no name for a stage"),
        ("stages={a: 3}", "stages.a: got 3, expected a mapping of sections"),
    ],
)
def test_mistakes(file: Path, override: str, message: str) -> None:
    if override.startswith("stages="):
        file.write_text(BASE[: BASE.index("stages:")] + override.replace("=", ": ", 1))
        assert message in error(file)
    elif message:
        (line,) = error(file, override).splitlines()
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
    message = error(file, f"stages.ppo.policy.model={model}")
    assert message == f"argument 'stages.ppo.policy.model={model}': stages.ppo.policy.model: got '{model}', but {rule}"


def test_an_argument_makes_no_stage(file: Path) -> None:
    assert error(file, "stages.pp.train.lr=1").endswith("has no stage 'pp'; did you mean ppo?")


def test_a_mistake_in_a_shared_section_is_told_once(file: Path) -> None:
    file.write_text(BASE.replace("dtype: float32", "dtype: int8"))
    assert error(file) == f"{file}:2: policy.dtype: got 'int8', expected `float32` or `bfloat16`"


def test_a_stage_goes_on_from_the_adapter_of_another(file: Path) -> None:
    changes = ["stages.sft.policy.lora={}", 'stages.ppo.policy={model: "tiny:llama", lora: {}, adapter: "stage:sft"}']
    loaded = load(file, changes)
    assert loaded.stages["ppo"].policy.adapter == "out/demo/sft/final"
    again = file.with_name("again.yaml")
    again.write_text(dump_yaml(loaded))
    assert "adapter: stage:sft" in again.read_text()
    assert load(again).stages == loaded.stages
    assert "stages.ppo.policy.adapter: got 'stage:stf'" in error(file, changes[0], changes[1].replace("sft", "stf"))


KINDS = """\
run: {name: demo, dir: out, seed: 3}
policy: {model: "tiny:llama", dtype: float32}
cluster: {object_store_gib: 0.5, roles: {policy: {threads: 1}, rollout: {threads: 1}}}
train: {steps: 2, lr: 1e-3, sequences_per_update: 32}
stages:
  a: {algorithm: {name: sft}, data: {train: a.jsonl}}
  b: {algorithm: {name: reward_model}, data: {train: b.jsonl}}
  soup:
    merge:
      method: ties
      base: "tiny:llama"
      models: {a: {model: "stage:a", density: 0.5}, x: {model: models/x}}
  judge:
    evaluate:
      model: stage:soup
      against: stage:a
      data: held.jsonl
      rewards: {correct: {function: last_number}, taste: {role: reward}}
      reward: {model: "stage:b"}
"""


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(KINDS)
    return path


def test_a_section_says_what_a_stage_is(kinds: Path) -> None:
    loaded = load(kinds)
    _, _, soup, judge = loaded.stages.values()
    assert isinstance(soup, MergeStage)
    assert isinstance(judge, EvaluationStage)
    assert list(loaded.runs) == ["a", "b"]
    assert soup.merge.models["a"].model == "out/demo/a/final"
    assert soup.merge.models["x"].model == "models/x"
    assert judge.evaluate.model == "out/demo/soup/final"
    assert judge.evaluate.against == "out/demo/a/final"
    assert judge.evaluate.reward is not None
    assert judge.evaluate.reward.model == "out/demo/b/final"
    assert (soup.run.name, judge.run.name) == ("demo/soup", "demo/judge")
    assert result_of(soup) == Path("out/demo/soup/final")
    assert result_of(judge) == Path("out/demo/judge/eval.json")


def test_an_evaluation_gets_of_the_shared_cluster_what_it_uses(kinds: Path) -> None:
    loaded = load(kinds)
    judge = loaded.stages["judge"]
    assert isinstance(judge, EvaluationStage)
    assert judge.cluster.object_store_gib == 0.5
    assert judge.cluster.roles.rollout.threads == 1  # no training stage has engines
    assert judge.cluster.roles.policy.threads == "auto"


def test_merges_and_evaluations_dump_and_repeat(kinds: Path) -> None:
    loaded = load(kinds)
    again = kinds.with_name("again.yaml")
    again.write_text(dump_yaml(loaded))
    assert dict(load(again).stages) == dict(loaded.stages)
    for model in ("model: stage:soup", "against: stage:a", "model: stage:b", "model: stage:a", "base: tiny:llama"):
        assert model in again.read_text()
    for name in ("soup", "judge"):  # in a stage's own folder: a pipeline of that stage
        again.write_text(dump_yaml(loaded.stages[name]))
        assert dict(load(again).stages) == {name: loaded.stages[name]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.soup.train.lr=1", "stages.soup.train: does not go with `merge`, which makes this stage a merge"),
        ("stages.soup.cluster.device=cuda", "stages.soup.cluster: does not go with `merge`"),
        ("stages.soup.evaluate.model=x", "stages.soup.evaluate: does not go with `merge`"),
        (
            "stages.judge.policy.model=x",
            "stages.judge.policy: does not go with `evaluate`, which makes this stage an ev",
        ),
        ("stages.judge.eval.every=3", "stages.judge.eval: does not go with `evaluate`"),
        (
            "stages.a.merge.method=ties",
            "stages.a.merge: does not go with `algorithm`, which makes this stage a training",
        ),
        ("stages.soup={}", "stages.soup: has no section that says what it is: `algorithm` (it trains), `merge` or"),
        ("stages.soup={eval: {every: 3}}", "stages.soup: has no section that says what it is"),
        ("merge.method=ties", "merge: stands in each stage, not at the top: write stages.a.merge"),
        ("evaluate.model=x", "evaluate: stands in each stage, not at the top: write stages.a.evaluate"),
        ("stages.soup.merge.out=x", "stages.soup.merge.out: unknown key"),
        ("stages.soup.merge.t=0.3", "stages.soup.merge.t: has no effect here: method ties takes no t"),
        ("stages.soup.merge.models.x.wieght=2", "stages.soup.merge.models.x.wieght: unknown key; did you mean merge."),
        (
            "stages.soup.merge.models.x.model=stage:c",
            "stages.soup.merge.models.x.model: got 'stage:c', but there is no",
        ),
        ("stages.soup.merge.base=stage:judge", "got 'stage:judge', but stage judge does not run earlier"),
        ("stages.judge.evaluate.k=[1, 4]", "stages.judge.evaluate.k: has 4, but evaluate.samples_per_prompt is 1"),
        ("stages.judge.evaluate.samples_per_prompt=4", "is 4, but evaluate.temperature is 0: greedy responses"),
        ("stages.judge.evaluate.temperature=0.001", "got 0.001, expected 0 or a number from 0.01"),
        ("stages.judge.evaluate.reward=null", "stages.judge.evaluate.reward: is missing: evaluate.rewards.taste has"),
        (
            "stages.judge.evaluate.reward_policy.max_dropped_fraction=0.5",
            "has no effect here: an evaluation draws no other prompts",
        ),
        ("stages.judge.cluster.weight_sync=shm", "stages.judge.cluster.weight_sync: has no effect here"),
        ("stages.judge.cluster.roles.critic.cpus=2", "has no effect here: this stage starts no critic role"),
        ("stages.judge.cluster.address=local", "is local; a Ray that is started for this run is written null"),
        ("stages.judge.evaluate.rewards.correct.args.api_key=x", "looks like a secret"),
        ("stages.judge.cluster.object_store_gib=2", "is 2.0 here and 0.5 in stage a: all stages run in one Ray"),
        ("rollouts.top_p=0.5", "rollouts: no stage can use it: algorithm reward_model samples no responses"),
        ("data.system_prompt=Hi", ""),
    ],
)
def test_mistakes_in_merges_and_evaluations(kinds: Path, override: str, message: str) -> None:
    if not message:
        load(kinds, [override])
        return
    (line,) = error(kinds, override).splitlines()
    assert line.startswith(f"argument {override!r}: ")
    assert message in line


def test_an_evaluation_makes_no_model(kinds: Path) -> None:
    kinds.write_text(KINDS + "  last: {merge: {method: fold, models: {a: {model: stage:judge}}}}\n")
    assert "but stage judge is an evaluation and makes no model; earlier stages: a, b, soup" in error(kinds)


def test_without_rewards_nothing_of_sampling_has_an_effect(kinds: Path) -> None:
    kinds.write_text(KINDS[: KINDS.index("      rewards:")])
    assert "stages.judge.evaluate.against: has no effect here: evaluate.rewards is empty" in error(kinds)
    kinds.write_text(kinds.read_text().replace("      against: stage:a\n", ""))
    judge = load(kinds, ["cluster.roles={policy: {threads: 1}}"]).stages["judge"]
    assert isinstance(judge, EvaluationStage)
    assert judge.needs == {"policy"}
    assert judge.cluster.roles.policy.threads == 1
