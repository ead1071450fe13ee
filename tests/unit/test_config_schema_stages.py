"""A stage's section makes the stage a merge or an evaluation. Every mistake has a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import load
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.stages import MergeStage, result_of
from tests.fixtures.configs import file_error

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
    assert judge.evaluate.reward.model == "out/demo/b/final"
    assert (soup.run.name, judge.run.name) == ("demo/soup", "demo/judge")
    assert result_of(soup) == Path("out/demo/soup/final")
    assert result_of(judge) == Path("out/demo/judge/eval.json")
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
        ("stages.soup.train.lr=1", "stages.soup.train: cannot be combined with `merge`, which makes this stage a"),
        ("stages.soup.cluster.device=cuda", "stages.soup.cluster: cannot be combined with `merge`"),
        ("stages.soup.evaluate.model=x", "stages.soup.evaluate: cannot be combined with `merge`"),
        ("stages.judge.policy.model=x", "stages.judge.policy: cannot be combined with `evaluate`, which makes this"),
        ("stages.judge.eval.every=3", "stages.judge.eval: cannot be combined with `evaluate`"),
        ("stages.a.merge.method=ties", "stages.a.merge: cannot be combined with `algorithm`, which makes this stage a"),
        ("stages.soup={}", "stages.soup: needs one of the sections `algorithm` (to train), `merge` and"),
        ("stages.soup={eval: {every: 3}}", "stages.soup: needs one of the sections"),
        ("merge.method=ties", "merge: belongs in each stage, not at the top: write stages.a.merge"),
        ("evaluate.model=x", "evaluate: belongs in each stage, not at the top: write stages.a.evaluate"),
        ("stages.soup.merge.out=x", "stages.soup.merge.out: unknown key"),
        ("stages.soup.merge.t=0.3", "stages.soup.merge.t: has no effect here: method ties takes no t"),
        ("stages.soup.merge.models.x.wieght=2", "stages.soup.merge.models.x.wieght: unknown key; did you mean merge."),
        ("stages.soup.merge.models.x.model=stage:c", "got 'stage:c', but there is no"),
        ("stages.soup.merge.base=stage:judge", "got 'stage:judge', but stage judge does not run earlier"),
        ("stages.judge.evaluate.k=[1, 4]", "stages.judge.evaluate.k: has 4, but evaluate.samples_per_prompt is 1"),
        ("stages.judge.evaluate.samples_per_prompt=4", "evaluate.temperature is 0: greedy responses"),
        ("stages.judge.evaluate.temperature=0.001", "got 0.001, expected 0 (greedy) or a number from 0.01"),
        ("stages.judge.evaluate.reward=null", "stages.judge.evaluate.reward: is missing: evaluate.rewards.taste has"),
        ("stages.judge.evaluate.reward_policy.max_dropped_fraction=0.5", "has no effect here: an evaluation trains"),
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
    (line,) = file_error(kinds, override).splitlines()
    assert line.startswith(f"argument {override!r}: ")
    assert message in line


def test_an_evaluation_makes_no_model(kinds: Path) -> None:
    kinds.write_text(KINDS + "  last: {merge: {method: fold, models: {a: {model: stage:judge}}}}\n")
    assert "but stage judge is an evaluation and makes no model; earlier stages: a, b, soup" in file_error(kinds)


def test_without_rewards_nothing_of_sampling_has_an_effect(kinds: Path) -> None:
    kinds.write_text(KINDS[: KINDS.index("      rewards:")])
    assert "stages.judge.evaluate.against: has no effect here: evaluate.rewards is empty" in file_error(kinds)
    kinds.write_text(kinds.read_text().replace("      against: stage:a\n", ""))
    judge = load(kinds, ["cluster.roles={policy: {threads: 1}}"]).stages["judge"]
    assert judge.needs == {"policy"}
    assert judge.cluster.roles.policy.threads == 1
