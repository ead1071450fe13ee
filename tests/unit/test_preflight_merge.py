"""Merges that will not fit are refused before the first stage. Later stages know the shape of a merge's result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.config.schema.merge import MergeConfig
from rlhf.config.schema.model import LoraConfig
from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.merge import foresee
from rlhf.preflight.models import StageResults
from tests.merging_models import make_adapter


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "base").symlink_to(tiny_model)
    build_tiny_llama(folder / "other", seed=1)
    build_tiny_llama(folder / "tied", seed=1, tied=True)
    make_adapter(folder / "lora", folder / "base", seed=1)
    make_adapter(folder / "lora_of_other", folder / "other", seed=1)
    return folder


def made(models: Path) -> StageResults:
    """Return results of stages that have not run: whole models a, b, tied, a reward model, adapters."""
    bases = {"a": "base", "b": "base", "tied": "tied", "scores": "base", "l": "base", "l2": "other"}
    bases |= {"dora": "base", "experts": "base"}
    return StageResults(
        finals={f"run/{name}/final": str(models / base) for name, base in bases.items()},
        scored={"run/scores/final": "reward_model"},
        adapters={
            "run/l/final": LoraConfig(rank=4),
            "run/l2/final": LoraConfig(rank=4, init="pissa"),
            "run/dora/final": LoraConfig(dora=True),
            "run/experts/final": LoraConfig(target_parameters=("gate_up_proj",)),
        },
        restacked=set(),
    )


def result(models: Path, names: list[str], **values: Any) -> StageResults:
    """Return the results known after a merge called `run/m`. Names are stages, or folders of `models` behind ./."""
    known = made(models)
    paths = {name: f"{models}/{name[2:]}" if name[0] == "." else f"run/{name}/final" for name in (*names, "./tied")}
    if "base" in values:
        values["base"] = paths[values["base"]]
    inputs = {f"m{i}": {"model": paths[name]} for i, name in enumerate(names)}
    foresee(MergeConfig.model_validate({"models": inputs, **values}), known, final="run/m/final")
    return known


CAT = {"method": "cat", "output": "adapter"}


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["a", "a"], {"method": "linear"}, "merge.models.m1: is the same model as merge.models.m0 (run/a/final)"),
        (["a", "tied"], {"method": "linear"}, "do not fit: tie_word_embeddings is False in the one and True"),
        (["a", "./tied"], {"method": "linear"}, "do not fit: tie_word_embeddings"),
        (["./other", "./tied"], {"method": "linear"}, "do not fit: tie_word_embeddings"),
        (["a"], {"method": "task_arithmetic", "base": "./tied"}, "merge.models.m0 (MODELS/base) and merge.base"),
        (["a", "./none"], {"method": "linear"}, "merge.models.m1: the folder MODELS/none does not exist"),
        (["a", "scores"], {"method": "linear"}, "merge.models.m1 (run/scores/final) will have a scalar head"),
        (["a"], {"method": "fold"}, "merge.models.m0: run/a/final will be a whole model, and fold adds an adapter"),
        (["a", "l"], CAT, "merge.models.m0: run/a/final will be a whole model, and"),
        (["l", "dora"], CAT, "run/dora/final will be an adapter with dora, and"),
        (["l", "experts"], CAT, "run/experts/final will be an adapter with"),
        (["l", "l2"], CAT, "merge.models.m0 and merge.models.m1 are adapters of"),
        (["l", "./lora_of_other"], {"method": "svd", "output": "adapter"}, "are adapters of different bases"),
        (["./lora", "./lora_of_other"], CAT, "are adapters of different bases"),
    ],
)
def test_what_will_not_fit_is_refused(models: Path, names: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        result(models, names, **values)
    assert message.replace("MODELS", str(models)) in str(caught.value)


def test_what_fits_is_let_through(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result(models, ["a", "l", "./lora"], method="linear")
    assert whole.finals["run/m/final"] == str(models / "base")
    assert "run/m/final" not in whole.adapters
    assert result(models, ["l2", "./lora_of_other"], method="svd", output="adapter").adapters["run/m/final"].rank == 8
    deeper = result(models, ["a"], method="passthrough", slices=[{"model": "m0", "layers": [0, 2]}] * 2)
    assert "run/m/final" in deeper.restacked
    monkeypatch.setitem(sys.modules, "mergekit", None)  # the rest works without mergekit
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"merge\.method: linear needs mergekit, which is not installed"):
        result(models, ["a", "b"], method="linear")
    assert "run/m/final" not in result(models, ["l"], method="fold").adapters
    adapter = result(models, ["l", "./lora"], **CAT).adapters["run/m/final"]
    assert adapter.rank == adapter.alpha == 8


PROMPTS = {"task": "running_totals", "split": "eval", "size": 4}
CORRECT = {"correct": {"function": "last_number"}}


def pipeline(folder: Path, model: Path, **stages: Any) -> Any:
    data, dpo = folder / "pairs.jsonl", {"algorithm": {"name": "dpo"}}
    data.write_text("".join(json.dumps({"prompt": f"{n}=", "chosen": "1", "rejected": "0"}) + "\n" for n in range(8)))
    scores, lora = {"algorithm": {"name": "reward_model"}}, {**dpo, "policy": {"lora": {"dora": True}}}
    tree = {
        "run": {"name": "demo", "dir": str(folder)},
        "policy": {"model": str(model), "dtype": "float32"},
        "data": {"train": str(data)},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
        "stages": {"a": dpo, "b": dpo, "scores": scores, "lora": lora, **stages},
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    return load(folder / "run.yaml")


def evaluate(model: str, **keys: Any) -> dict[str, Any]:
    settings = {"data": PROMPTS, "apply_chat_template": False, "rewards": CORRECT, "max_new_tokens": 8}
    return {"evaluate": {"model": model, **settings, **keys}}


UNKNOWN = "stages.e: evaluate.rewards.correct.function: there is no reward `math_answr`"
NO_SCORES = "stages.e: evaluate.reward.model: FOLDER/demo/b/final will be a language model, expected a reward model"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"m": {"merge": {"method": "linear", "models": {"x": {"model": "stage:a"}, "y": {"model": "stage:a"}}}}},
            "stages.m: merge.models.y: is the same model as merge.models.x",
        ),
        ({"m": {"merge": {"method": "fold", "models": {"x": {"model": "stage:a"}}}}}, "stages.m: merge.models.x: "),
        ({"e": evaluate("stage:scores")}, "stages.e: evaluate.model: FOLDER/demo/scores/final will be a reward model"),
        ({"e": evaluate("stage:a", against="stage:scores")}, "stages.e: evaluate.against: FOLDER/demo/scores/final"),
        ({"e": evaluate("stage:lora")}, "stages.e: evaluate.model: FOLDER/demo/lora/final will be an adapter with"),
        ({"e": evaluate("./none")}, "stages.e: evaluate.model: The model folder ./none does not exist"),
        ({"e": evaluate("stage:a", data="none.jsonl")}, "stages.e: evaluate.data.heldout: none.jsonl does not exist"),
        ({"e": evaluate("stage:a", rewards={"correct": {"function": "math_answr"}})}, UNKNOWN),
        ({"e": evaluate("stage:a", rewards={"x": {"role": "reward"}}, reward={"model": "stage:b"})}, NO_SCORES),
        ({"e": evaluate("stage:a", max_new_tokens=100_000)}, "stages.e: evaluate.data.heldout: "),
    ],
)
def test_the_stage_is_named(tiny_model: Path, tmp_path: Path, stages: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_inputs(pipeline(tmp_path, tiny_model, **stages))
    assert str(caught.value).startswith(message.replace("FOLDER", str(tmp_path)))


def test_a_pipeline_of_all_kinds_is_checked_before_its_models_are_there(tiny_model: Path, tmp_path: Path) -> None:
    soup = {"method": "task_arithmetic", "base": "tiny:llama", "models": {"a": {"model": "stage:a"}}}
    after = {"algorithm": {"name": "dpo"}, "policy": {"model": "stage:soup"}}
    rewards = {"x": {"role": "reward"}}
    judge = evaluate("stage:soup", against="stage:a", rewards=rewards, reward={"model": "stage:scores"})
    loaded = pipeline(tmp_path, tiny_model, soup={"merge": soup}, after=after, judge=judge)
    assert len(load_inputs(loaded)) == 7
    assert not (tmp_path / "demo" / "soup").exists()
