"""What loads, in which state, and what each failure says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.loading import (
    architecture_fingerprint,
    load_causal_lm,
    load_config,
    load_critic,
    load_reward_model,
    load_tokenizer,
    refuse_no_language_model,
)


def with_config(source: Path, folder: Path, **changes: object) -> str:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_training_mode_without_dropout(tiny_model: Path, tmp_path: Path) -> None:
    path = with_config(tiny_model, tmp_path / "m", attention_dropout=0.5)
    model = load_causal_lm(path, dtype=torch.bfloat16, gradient_checkpointing=True)
    assert model.training
    assert model.dtype == torch.bfloat16
    assert model.is_gradient_checkpointing
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.0}


def test_a_new_critic_values_everything_at_zero(tiny_model: Path) -> None:
    critic = load_critic(str(tiny_model), dtype=torch.float32)
    assert critic.score.weight.shape == (1, critic.config.hidden_size)
    assert not critic.score.weight.any()


def test_a_reward_model_has_a_reward_head(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no reward head") as error:
        load_reward_model(str(tiny_model), dtype=torch.float32)
    assert str(tiny_model) in str(error.value)
    head = torch.full((1, load_config(str(tiny_model)).hidden_size), 0.5)
    model = load_critic(str(tiny_model), dtype=torch.float32)
    model.score.weight.data.copy_(head)
    model.save_pretrained(tmp_path / "reward")
    assert torch.equal(load_reward_model(str(tmp_path / "reward"), dtype=torch.float32).score.weight, head)
    assert torch.equal(load_critic(str(tmp_path / "reward"), dtype=torch.float32).score.weight, head)


@pytest.mark.parametrize(
    ("changes", "is_language_model"),
    [
        ({}, True),
        ({"architectures": None}, True),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, True),
        ({"architectures": ["OwnLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnLM"}}, True),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"architectures": ["LlamaForTokenClassification"]}, False),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, False),
        ({"architectures": [], "model_type": "t5"}, False),
    ],
)
def test_a_language_model_has_a_head_for_tokens(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], is_language_model: bool
) -> None:
    path = with_config(tiny_model, tmp_path / "m", **changes)
    if is_language_model:
        refuse_no_language_model(path)
        return
    with pytest.raises(UserError, match=r"is a .*, not a causal language model: it has no head") as error:
        refuse_no_language_model(path)
    assert path in str(error.value)


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_causal_lm(path, dtype=torch.float32)


def test_an_unreachable_hub_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"no-owner/no-such-model .*HF_HUB_OFFLINE"):
        load_tokenizer("no-owner/no-such-model")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "X"}}'),
        ("tokenizer_config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
    ],
)
def test_a_damaged_file_is_one_error(tiny_model: Path, tmp_path: Path, file: str, text: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / file).write_text(text)
    load = load_config if file == "config.json" else load_tokenizer
    with pytest.raises(UserError, match=r"m cannot be loaded \(.*: .*\): a file of it is damaged\. Get it again"):
        load(str(tmp_path / "m"))


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(UserError, match=r"is an adapter, and this needs a whole model.*`adapter` beside `model`"):
        load_config(str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.resolved.yaml").write_text("")
    with pytest.raises(UserError, match="is the folder of a run, not a model: it has no final/"):
        load_config(str(run))
    (run / "final").mkdir()
    with pytest.raises(UserError, match=f"is the folder of a run, not a model: name what it has trained, {run}/final"):
        load_tokenizer(str(run))


def test_weights_other_than_safetensors_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(str(tmp_path / "m"), dtype=torch.float32)


def test_fingerprints_tell_models_apart_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    own = architecture_fingerprint(load_config(str(tiny_model)))
    copy = with_config(tiny_model, tmp_path / "copy", use_cache=False, dtype="bfloat16", transformers_version="0")
    assert architecture_fingerprint(load_config(copy)) == own
    assert architecture_fingerprint(load_causal_lm(copy, dtype=torch.bfloat16).config) == own
    other = with_config(tiny_model, tmp_path / "other", num_hidden_layers=2)
    assert architecture_fingerprint(load_config(other)) != own
