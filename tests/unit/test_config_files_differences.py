"""Differences between two configurations of a run exclude the place of the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.differences import changes, differences, portable
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import load
from rlhf.config.schema.stages import Stage

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
def test_what_matters_for_the_result_has_changed(
    tmp_path: Path, stage: str, override: str, expected: list[str]
) -> None:
    made, now = stages(tmp_path)[stage], stages(tmp_path, override)[stage]
    assert changes(resolved(tmp_path, made), now) == expected


def test_a_secret_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    now = stages(tmp_path, "data.system_prompt=use 0123456789abcdef")["sft"]
    there = stages(tmp_path, "data.system_prompt=use ***")["sft"]
    assert changes(resolved(tmp_path, there), now) == []
