"""Models unsuitable for a section are refused before anything starts, with the section's key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from rlhf.config.files.load import load
from rlhf.preflight.inputs import load_inputs
from tests.fakes.runs import PAIRS, loaded, ppo, refusal


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: other_words (two tokens are swapped), more_words, no_words (no tokenizer), two_labels, encoder."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("other_words", "no_words", "two_labels"):
        shutil.copytree(tiny_model, folder / name)
    words = json.loads((tiny_model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "other_words" / "tokenizer.json").write_text(json.dumps(words))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<score>"]})
    shutil.copytree(tiny_model, folder / "more_words")
    tokenizer.save_pretrained(folder / "more_words")
    for path in (folder / "no_words").glob("*token*"):
        path.unlink()
    (folder / "no_words" / "chat_template.jinja").unlink(missing_ok=True)
    shape = json.loads((tiny_model / "config.json").read_text())
    shape |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (folder / "two_labels" / "config.json").write_text(json.dumps(shape))
    shutil.copytree(tiny_model, folder / "encoder")
    encoder = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    encoder.architectures = ["BertModel"]
    encoder.save_pretrained(folder / "encoder")
    return folder


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_prj"]}, "policy.lora.target_modules: the model has no linear layers named q_prj"),
        ({"target_modules": ["lm_head"]}, "policy.lora.target_modules: the head is not adapted"),
        ({"modules_to_save": ["score"]}, "policy.lora.modules_to_save: the model has no modules named score"),
        ({"layers": [0, 99]}, "policy.lora.layers: the model has layers 0 to"),
        ({"rank": 4096, "init": "pissa"}, "policy.lora.rank: is 4096, but a"),
    ],
)
def test_an_adapter_that_the_model_cannot_have(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    run = loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", "lora": lora})
    assert refusal(run).startswith(message)


def test_a_dense_model_has_no_load_to_balance(tiny_model: Path, tmp_path: Path) -> None:
    run = loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", "router_balance_coef": 0.01})
    assert refusal(run).startswith("policy.router_balance_coef: is 0.01, but")


def test_a_dense_model_has_no_choices_to_replay(tiny_model: Path, tmp_path: Path) -> None:
    task = {"task": "running_totals", "split": "train", "size": 8}
    run = loaded(
        tmp_path,
        policy={"model": str(tiny_model), "dtype": "float32", "router_replay": True},
        algorithm={"name": "grpo"},
        data={"train": task, "max_prompt_tokens": 16, "apply_chat_template": False},
        rollouts={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        rewards={"digits": {"function": "format_regex", "args": {"pattern": ".*"}}},
    )
    assert refusal(run).startswith("policy.router_replay: is true, but")


def test_an_adapter_that_it_can_have_is_let_through(tiny_model: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "init": "pissa", "rslora": True, "modules_to_save": ["lm_head"], "layers": [0]}
    assert load_inputs(loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", "lora": lora}))
    reward_model = {"model": str(tiny_model), "dtype": "float32", "lora": {"dora": True}}
    assert load_inputs(loaded(tmp_path, policy=reward_model, algorithm={"name": "reward_model"}))


def test_what_is_no_language_model_trains_no_policy(models: Path, tmp_path: Path) -> None:
    message = refusal(loaded(tmp_path, policy={"model": str(models / "encoder"), "dtype": "float32"}))
    assert message.startswith(f"policy.model: The model {models}/encoder is a BertModel, not a causal language model")


def test_a_classifier_of_two_labels_becomes_no_reward_model(models: Path, tmp_path: Path) -> None:
    policy = {"model": str(models / "two_labels"), "dtype": "float32"}
    message = refusal(loaded(tmp_path, policy=policy, algorithm={"name": "reward_model"}))
    assert message == (
        f"policy.model: {models}/two_labels has a head of 2 labels, expected one label, or a language model"
    )


def test_a_role_must_read_the_policys_tokens(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    message = refusal(ppo(tmp_path, tiny_model, critic={"model": str(models / "other_words")}))
    assert message.startswith(f"critic.model: {models}/other_words has another vocabulary than policy.model")
    for name in ("no_words", "more_words"):  # its weights alone: it reads what it is given; a token that never comes
        assert load_inputs(ppo(tmp_path, tiny_model, critic={"model": str(models / name)}))


def test_a_teacher_has_the_students_tokens_and_no_others(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in PAIRS))

    def run(teacher: str) -> Any:
        student = {"model": str(tiny_model), "dtype": "float32"}
        distilled = {"algorithm": {"name": "distillation"}, "data": {"train": str(data)}, "policy": student}
        return loaded(tmp_path, **distilled, teacher={"model": teacher})

    for name in ("other_words", "more_words"):
        message = refusal(run(str(models / name)))
        assert message.startswith(
            f"teacher.model: {models}/{name} has another vocabulary than policy.model {tiny_model}"
        )
    assert refusal(run(str(models / "encoder"))).startswith(f"teacher.model: The model {models}/encoder is a BertModel")
    for folder in (models / "no_words", tiny_model):
        assert load_inputs(run(str(folder)))


def test_the_result_of_a_stage_has_the_vocabulary_of_what_it_trained(
    tiny_model: Path, models: Path, tmp_path: Path
) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in PAIRS))
    shared = {
        "data": {"train": str(data)},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
    }
    large = shared | {"policy": {"model": str(models / "other_words")}, "algorithm": {"name": "sft"}}
    small = shared | {"policy": {"model": str(tiny_model)}, "algorithm": {"name": "distillation"}}
    small["teacher"] = {"model": "stage:large"}
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps({"run": {"name": "a", "dir": str(tmp_path)}, "stages": {"large": large, "small": small}})
    )
    message = refusal(load(path))
    assert message.startswith(f"stages.small: teacher.model: {models}/other_words has another vocabulary")


def test_in_a_pipeline_the_stage_is_named(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    stage = {
        "algorithm": {"name": "dpo"},
        "data": {"train": str(tmp_path / "pairs.jsonl")},
        "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256},
    }
    first = stage | {"policy": {"model": str(tiny_model), "dtype": "float32"}}
    second = stage | {"policy": {"model": str(models / "encoder"), "dtype": "float32"}}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    path = tmp_path / "run.yaml"
    run = {"name": "demo", "dir": str(tmp_path)}
    path.write_text(json.dumps({"run": run, "stages": {"a": first, "b": second}}))
    assert refusal(load(path)).startswith("stages.b: policy.model: The model ")
