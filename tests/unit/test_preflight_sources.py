"""Rewards, arguments of vLLM's engine and merges that will not fit are refused before the first stage of a run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.merge import MergeConfig
from rlhf.config.schema.model import LoraConfig
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.validation.engine_args import OWNED
from rlhf.data.row import Row
from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.engine_args import known_engine_args, refuse_unknown_engine_args
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.merge import foresee
from rlhf.preflight.models import StageResults
from rlhf.preflight.sources import check_rewards, load_rewards, refuse_unused_rewards
from rlhf.rewards.scoring import RewardSpec
from tests.fixtures.configs import ONLINE, changed, refusal
from tests.fixtures.sources import keywords
from tests.merging_models import make_adapter


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(file="d.jsonl", line=i, columns={"prompt": "p", **one}) for i, one in enumerate(columns, start=1)]


def specs(**rewards: dict[str, Any]) -> tuple[RewardSpec, ...]:
    configs = {name: RewardConfig.model_validate(one) for name, one in rewards.items()}
    return load_rewards(configs, beside=Path.cwd(), memory_gib=8.0)


MATHS = {"function": "last_number", "only": {"kind": ["maths", "sums"]}}
CODE = {"url": "http://127.0.0.1:9/", "only": {"kind": ["code"]}}
JUDGE = {"url": "http://127.0.0.1:9/v1", "judge": {"model": "m", "prompt": "{response} {answer}"}}
OF_RESULT = {"url": "http://127.0.0.1:9/v1", "judge": {"model": "m", "prompt": "{result} {answer}"}}
GATED = {"url": "http://127.0.0.1:9/", "gate": "maths"}
PLAIN = {"function": "last_number", "only": {"kind": ["maths"]}}
DAY = datetime.date(2026, 1, 1)
RIGHT, CODED = {"kind": "maths", "answer": "1"}, {"kind": "code"}


def nested(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("rewards", "columns"),
    [
        ({"maths": MATHS, "code": CODE}, [{"kind": "sums", "answer": "1"}, CODED]),
        ({}, [CODED]),  # without rewards a row needs no column
        ({"code": CODE, "other": PLAIN}, [RIGHT | {"day": DAY}, CODED]),  # a function may get a value that is no JSON
        ({"taste": JUDGE}, [{"answer": "1", "day": DAY}]),  # the judge's question does not use the day
    ],
)
def test_rows_with_the_columns_of_their_rewards_pass(rewards: dict[str, Any], columns: list[dict[str, Any]]) -> None:
    check_rewards(specs(**rewards), rows(*columns), "data.train")


@pytest.mark.parametrize(
    ("rewards", "columns", "message"),
    [
        (
            {"maths": MATHS, "code": CODE},
            [{"kind": "maths"}, CODED | {"answer": "1"}],
            "rewards.maths.function: `last_number` needs the column `answer`",
        ),
        ({"maths": MATHS, "code": CODE}, [CODED, {"kind": "Code"}], "d.jsonl:2: no reward applies to the row"),
        (
            {"maths": MATHS, "short": GATED},
            [RIGHT, CODED],
            "rewards.short.gate: maths does not apply to d.jsonl:2, and short does",
        ),
        ({"maths": MATHS}, [RIGHT, {"answer": nested(900)}], "d.jsonl:2: its columns are nested deeper than 64 levels"),
        ({"code": CODE}, [CODED | {"day": DAY}], "d.jsonl:1: cannot be sent to rewards.code as JSON: .*date"),
        ({"taste": JUDGE}, [{"kind": "x"}], r"taste.judge: names \{answer\}, and the rows of data.train"),
        ({"taste": OF_RESULT}, [{"answer": "1"}], r"taste.judge: names \{result\}, and the rows of data.train"),
    ],
)
def test_rows_that_a_reward_cannot_score_are_refused(
    rewards: dict[str, Any], columns: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_rewards(specs(**rewards), rows(*columns), "data.train")

    if "taste" in rewards:  # a judge may ask about the result of an agent
        check_rewards(specs(taste=OF_RESULT), rows({"answer": "1"}), "data.train", of_sessions=("result",))


def test_values_are_compared_with_their_types() -> None:
    (spec,) = specs(one={"function": "last_number", "only": {"level": [1, True]}})
    assert [value for value in (1, True, "1", 1.0, None) if spec.applies_to({"level": value})] == [1, True]
    (spec,) = specs(one={"function": "last_number", "only": {"level": [1], "kind": ["a"]}})
    assert spec.applies_to({"level": 1, "kind": "a"})
    assert not spec.applies_to({"level": 1})
    assert not spec.applies_to({"level": True, "kind": "a"})


def test_a_reward_for_no_row_of_the_training_data_is_refused() -> None:
    found = specs(maths=MATHS, code=CODE)
    refuse_unused_rewards(found, [{"kind": "maths"}, {"kind": "code"}])
    with pytest.raises(UserError, match=r"rewards.code.only: applies to no row .* where `kind` is the string 'maths'"):
        refuse_unused_rewards(found, [{"kind": "maths"}])
    with pytest.raises(UserError, match="there is no column `kind`"):
        refuse_unused_rewards(found, [{"sort": "maths"}])


def test_the_token_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"url": "https://judge.example/v1", "token_env": "JUDGE_KEY"}
    with pytest.raises(UserError, match=r"rewards.taste.token_env: the environment variable JUDGE_KEY is not set"):
        specs(taste=config)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="JUDGE_KEY holds more than plain text"):
        specs(taste=config)
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    (spec,) = specs(taste=config)
    assert spec.remote.service.token == "s3cret"
    assert "s3cret" not in repr(spec)


def cluster(**arguments: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"roles": {"rollout": {"engine_args": arguments}}})


def test_names_are_those_of_the_installed_vllm() -> None:
    from vllm import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert known_engine_args() == {name for name in fields if not name.startswith("_")}


def test_every_argument_that_the_project_sets_is_owned_or_may_be_changed() -> None:
    changeable = "async_scheduling attention_backend block_size compilation_config enable_chunked_prefill "
    changeable += (
        "enable_prefix_caching hf_overrides max_num_batched_tokens override_generation_config skip_mm_profiling"
    )
    ours = keywords("actors/rollout/vllm_engine.py", "EngineArgs")
    assert ours - set(changeable.split()) <= OWNED.keys() <= known_engine_args()


def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unknown_engine_args(cluster(enable_expert_parallel=True, kv_offloading_size=16))
    with pytest.raises(UserError, match=r"engine_args\.enable_expert_paralel: vllm.* did you mean enable_expert_paral"):
        refuse_unknown_engine_args(cluster(enable_expert_paralel=True))
    with pytest.raises(UserError, match=r"engine_args\.zzz: .*its EngineArgs lists all names"):
        refuse_unknown_engine_args(cluster(zzz=1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_unknown_engine_args(cluster(zzz=1))  # without vLLM the engines check the names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{max_model_len: 8}", "max_model_len: follows from data.max_prompt_tokens and rollouts.max_new_tokens"),
        (
            "{async_scheduling: true}",
            "async_scheduling: is true, but vLLM has no such scheduling with cluster.device cpu",
        ),
        ("{speculative_config: {method: eagle}}", "speculative_config: is not a mapping with method: ngram"),
        ("{speculative_config: {method: ngram, draft_sample_method: x}}", "has draft_sample_method, but with"),
        ("{enable_chunked_prefill: true}", "enable_chunked_prefill: is true, but with cluster.device cpu"),
    ],
)
def test_arguments_of_other_keys_are_refused_at_load(given: str, message: str) -> None:
    assert message in refusal(ONLINE, [f"cluster.roles.rollout.engine_args={given}"])


@pytest.mark.parametrize(
    "overrides",
    [["rollouts.min_p=0.1"], ["rollouts.carry_over=true", "rollouts.oversample=1.5", "algorithm.correction=none"]],
)
def test_keys_that_drafts_would_not_follow_are_refused(overrides: list[str]) -> None:
    drafts = "cluster.roles.rollout.engine_args={speculative_config: {method: ngram, num_speculative_tokens: 4}}"
    changed(ONLINE, overrides)  # without drafts nothing is refused
    message = f"{overrides[0].partition('=')[0]}: is .*, but speculative_config is set"
    assert re.search(message, refusal(ONLINE, [*overrides, drafts]))


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
        (["a", "tied"], {"method": "linear"}, "do not fit: tie_word_embeddings is False in the first model and True"),
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
