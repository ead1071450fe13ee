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


def test_a_policy_that_the_model_cannot_be_is_refused(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    grpo = {
        "algorithm": {"name": "grpo"},
        "data": {"train": {"task": "running_totals", "size": 8}, "max_prompt_tokens": 64},
        "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        "rewards": {"right": {"function": "exact_match"}},
    }
    of_score, encoder, labels = {"algorithm": {"name": "reward_model"}}, models / "encoder", models / "two_labels"
    for policy, sections, message in (
        (
            {"lora": {"target_modules": ["q_prj"]}},
            {},
            "lora.target_modules: the model has no linear layers named q_prj",
        ),
        ({"lora": {"target_modules": ["lm_head"]}}, {}, "lora.target_modules: the head is not adapted"),
        ({"lora": {"modules_to_save": ["score"]}}, {}, "lora.modules_to_save: the model has no modules named score"),
        ({"lora": {"layers": [0, 99]}}, {}, "lora.layers: the model has layers 0 to"),
        ({"lora": {"rank": 4096, "init": "pissa"}}, {}, "lora.rank: is 4096, but a"),
        ({"router_balance_coef": 0.01}, {}, "router_balance_coef: is 0.01, but"),
        ({"router_replay": True}, grpo, "router_replay: is true, but"),
        ({"model": str(encoder)}, {}, f"model: The model {encoder} is a BertModel, not a causal language model"),
        (
            {"model": str(labels)},
            of_score,
            f"model: {labels} has a head of 2 labels, expected one label, or a language",
        ),
    ):
        run = loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", **policy}, **sections)
        assert refusal(run).startswith(f"policy.{message}")


def test_an_adapter_that_it_can_have_is_let_through(tiny_model: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "init": "pissa", "rslora": True, "modules_to_save": ["lm_head"], "layers": [0]}
    assert load_inputs(loaded(tmp_path, policy={"model": str(tiny_model), "dtype": "float32", "lora": lora}))
    reward_model = {"model": str(tiny_model), "dtype": "float32", "lora": {"dora": True}}
    assert load_inputs(loaded(tmp_path, policy=reward_model, algorithm={"name": "reward_model"}))


def test_a_role_must_read_the_policys_tokens(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    message = refusal(ppo(tmp_path, tiny_model, critic={"model": str(models / "other_words")}))
    assert message.startswith(f"critic.model: {models}/other_words has another vocabulary than policy.model")
    for name in ("no_words", "more_words"):  # its weights alone: it reads what it is given; a token that never comes
        assert load_inputs(ppo(tmp_path, tiny_model, critic={"model": str(models / name)}))


def test_a_teacher_has_the_students_tokens_and_no_others(tiny_model: Path, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in PAIRS))
    distilled = {"algorithm": {"name": "distillation"}, "data": {"train": str(data)}}

    def run(teacher: str) -> Any:
        return loaded(tmp_path, **distilled, policy={"model": str(tiny_model)}, teacher={"model": teacher})

    for name in ("other_words", "more_words"):
        words = f"{models}/{name} has another vocabulary than policy.model {tiny_model}"
        assert refusal(run(str(models / name))).startswith(f"teacher.model: {words}")
    assert refusal(run(str(models / "encoder"))).startswith(f"teacher.model: The model {models}/encoder is a BertModel")
    for folder in (models / "no_words", tiny_model):
        assert load_inputs(run(str(folder)))


def test_in_a_pipeline_the_stage_is_named_and_a_result_has_the_vocabulary_of_its_policy(
    tiny_model: Path, models: Path, tmp_path: Path
) -> None:
    def pipeline(first: str, algorithm: str, second: str, **sections: Any) -> Any:
        train = {"steps": 1, "lr": 1e-3, "sequences_per_update": 4, "max_tokens_per_microbatch": 256}
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row | {"completion": row["chosen"]}) + "\n" for row in PAIRS))
        shared = {"data": {"train": str(data)}, "train": train}
        stages = {
            "a": {**shared, "policy": {"model": first}, "algorithm": {"name": "sft"}},
            "b": {**shared, "policy": {"model": second}, "algorithm": {"name": algorithm}, **sections},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps({"run": {"name": "demo", "dir": str(tmp_path)}, "stages": stages}))
        return load(path)

    words, tiny = str(models / "other_words"), str(tiny_model)
    message = refusal(pipeline(words, "distillation", tiny, teacher={"model": "stage:a"}))
    assert message.startswith(f"stages.b: teacher.model: {words} has another vocabulary")
    assert refusal(pipeline(tiny, "dpo", str(models / "encoder"))).startswith("stages.b: policy.model: The model ")
