"""The merge section accepts the keys of a method, and refuses other keys with a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.config.files.load import load_merge_file
from rlhf.config.schema.merge import METHODS, MergeInput, MergeRun, in_effect
from rlhf.config.validation.merge import merge_problems
from rlhf.config.yaml_tree import to_yaml

TIES = """\
merge:
  method: ties
  base: models/base
  models:
    math: {model: runs/a/final, weight: 0.5, density: 0.5}
    chat: {model: runs/b/final, weight: 0.5}
  out: merged/
"""
PASSTHROUGH = "merge={method: passthrough, models: {a: {model: x}, b: {model: y}}, out: z, slices: [%s]}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "merge.yaml"
    path.write_text(TIES)
    return path


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(rlhf.UserError) as caught:
        load_merge_file(path, overrides)
    return str(caught.value).replace(str(path), "file")


def test_a_file_and_arguments(file: Path) -> None:
    config = rlhf.load_merge(file, ["merge.scale=0.7", "merge.models.code={model: runs/c/final, weight: -0.2}"])
    assert (config.method, config.scale, config.out) == ("ties", 0.7, Path("merged"))
    assert list(config.models) == ["math", "chat", "code"]
    assert config.models["chat"] == MergeInput(model="runs/b/final", weight=0.5)
    assert config.models["code"].weight == -0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge.metod=x"], "argument 'merge.metod=x': merge.metod: unknown key; did you mean merge.method?"),
        (["merge.models.math.wieght=1"], "argument 'merge.models.math.wieght=1': merge.models.math.wieght: unknown"),
        (["merge.models.math.density=0"], "merge.models.math.density: got 0, expected a number > 0 and <= 1"),
        (["merge.base=null"], "merge.base: is missing: method ties needs it; name the common ancestor"),
        (["merge.seed=0"], "merge.seed: has no effect here: method ties takes no seed; remove the key"),
        (["merge.models.math.epsilon=0.1"], "has no effect here: method ties takes no epsilon; remove the key"),
        (["merge.models={}"], "merge.models: has 0, but method ties takes at least 1 model in addition to merge.base"),
        (["merge.tokenizer=mth"], "merge.tokenizer: got 'mth'; did you mean math?"),
        (
            ["merge.models.base={model: x}"],
            "merge.models.base: is not a valid name, because `base` stands for merge.base",
        ),
        (["merge.output=adapter"], "merge.base: has no effect here: method ties on adapters takes no base"),
        (["merge.output=adapter", "merge.base=null"], "densities differ (math: 0.5, chat: 1); adapters share one"),
        (["merge={method: ties_svd, output: adapter, models: {a: {model: x}}, out: z}"], "has 1, but method ties_svd"),
        (["merge.method=slerp"], "merge.models: has 2, but method slerp takes one model in addition to merge.base"),
        (["merge.method=svd"], "merge.method: svd makes no model; set merge.output to adapter, or take one of linear"),
        (["merge.method=della", "merge.models.math.density=0.9"], "models.math.density: 0.9 -/+ epsilon 0.15"),
        (["merge.method=dare_ties", "merge.models.math.density=1.0"], "every density is 1, so dare_ties drops nothing"),
        (["merge={method: linear, models: {a: {model: x}, b: {model: y, weight: -1}}, out: z}"], "weights add up to 0"),
        (["merge.scale=0"], "merge.scale: is 0, so the result is merge.base; give another factor"),
        (["merge.models.math.weight=0", "merge.models.chat.weight=0.0"], "merge.models: every weight is 0, so nothing"),
        (["merge.shard_gib=1e-12"], "merge.shard_gib: got 1e-12, expected a number >= 1e-06"),
        ([PASSTHROUGH % ""], "merge.slices: is missing: passthrough stacks layers"),
        ([PASSTHROUGH % "{model: a, layers: [0, 4]}"], "merge.models.b: has no effect here: no slice uses its layers"),
        ([PASSTHROUGH % "{model: a, layers: [4, 4]}, {model: b, layers: [0, 1]}"], "layers [4, 4] of a are empty"),
        ([PASSTHROUGH % "{model: c, layers: [0, 4]}"], "merge.slices: got 'c'; the models are a, b"),
        (
            [PASSTHROUGH % "{model: a, leyers: [0, 4]}"],
            "leyers: unknown key; did you mean merge.slices.0.layers?",
        ),
        (
            [PASSTHROUGH % "{model: a, layers: [0, -1]}"],
            "slices.0.layers: got -1, expected a list of 2 integers >= 0",
        ),
        (["run.name=x"], "run: unknown key; the file has merge"),
    ],
)
def test_mistakes(file: Path, overrides: list[str], message: str) -> None:
    assert message in mistakes(file, *overrides)


def test_each_line_of_an_error_has_its_place(file: Path) -> None:
    file.write_text(TIES.replace("weight: 0.5}", "epsilon: 0.1}").replace("  out", "  t: 0.1\n  out"))
    assert mistakes(file).splitlines() == [
        "file:7: merge.t: has no effect here: method ties takes no t; remove the key",
        "file:6: merge.models.chat.epsilon: has no effect here: method ties takes no epsilon; remove the key",
    ]


def test_what_is_in_effect_repeats_the_merge(tmp_path: Path, file: Path) -> None:
    for method, takes in METHODS["model"].items():
        density = {"density": 0.5} if "density" in takes.per_model else {}
        names = ["m"] if takes.most == 1 else ["m", "n"]
        values = {"method": method, "out": tmp_path, "models": {name: {"model": name, **density} for name in names}}
        values |= {"base": "b"} if "base" in takes.keys else {}
        if method == "passthrough":
            values["slices"] = [{"model": name, "layers": (0, 2)} for name in names]
        config = MergeRun.model_validate(values)
        assert merge_problems(config) == ()
        file.write_text(to_yaml({"merge": in_effect(config)}))
        assert load_merge_file(file).model_dump() == config.model_dump()


def test_a_file_that_holds_no_merge_and_a_merge_that_is_no_run(file: Path) -> None:
    with pytest.raises(rlhf.UserError, match=r":1: merge: is not a section of a run; use `rlhf merge "):
        rlhf.load_config(file)
    file.write_text("")
    assert mistakes(file) == "file: the file is empty; a merge needs the section merge, with method, models and out"
    file.write_text("run: {name: a}\nmodels: {}\n")
    expected = "file: is the configuration of a run, not of a merge; use `rlhf train file`"
    assert mistakes(file, "merge.scale=1") == expected
