"""Models load with the right dtype, mode and head. Every failure has a message."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config.schema.merge import MergeConfig
from rlhf.errors import UserError
from rlhf.merging.merge import merge_models
from rlhf.models.files.loading import (
    architecture_fingerprint,
    load_causal_lm,
    load_critic,
    load_model_config,
    load_tokenizer,
    refuse_no_language_model,
)
from rlhf.models.packed.heads import sequence_scores
from rlhf.models.packed.row_check import check_rows
from rlhf.models.reward_models import load_reward_model, refuse_without_head
from tests.fixtures.models import change_json, changed_copy
from tests.merging_models import make_adapter, make_reward_adapter
from tests.tiny_architectures import tiny_model as model_of


def test_layers_are_recomputed_though_the_model_is_in_evaluation_mode(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.bfloat16, gradient_checkpointing=True)
    assert model.dtype == torch.bfloat16
    passes = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum().backward()
    assert len(passes) == 2  # forward, and again in the backward pass


# Published models with dropout in their config.json, or with noise in their routers, and the keys that set it.
RANDOM = {
    "biogpt": ["hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop", "activation_dropout"],
    "bloom": ["hidden_dropout", "attention_dropout"],
    "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "gpt_bigcode": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "gpt_neox_japanese": ["hidden_dropout", "attention_dropout"],
    "llama": ["attention_dropout"],
    "mixtral": ["attention_dropout", "router_jitter_noise"],
    "opt": ["dropout", "attention_dropout", "layerdrop"],
    "persimmon": ["hidden_dropout", "attention_dropout"],
    "phi3": ["resid_pdrop", "embd_pdrop", "attention_dropout"],
    "phimoe": ["attention_dropout", "router_jitter_noise", "input_jitter_noise"],
    "seed_oss": ["residual_dropout", "attention_dropout"],
    "starcoder2": ["residual_dropout", "embedding_dropout", "attention_dropout"],
    "xglm": ["dropout", "attention_dropout", "activation_dropout", "layerdrop"],
}


@pytest.mark.parametrize("name", RANDOM)
def test_no_pass_draws_random_numbers(name: str, tmp_path: Path) -> None:
    model_of(name, **dict.fromkeys(RANDOM[name], 0.3)).save_pretrained(tmp_path)
    tokens = torch.arange(3, 12)[None]
    for checkpointing in (False, True) if name != "gpt_neox_japanese" else (False,):
        model = load_causal_lm(str(tmp_path), dtype=torch.float32, gradient_checkpointing=checkpointing)
        one, two = (model(tokens, use_cache=False).logits for _ in range(2))
        assert torch.equal(one, two)
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens, use_cache=False).logits, one)


def test_a_model_that_draws_random_numbers_all_the_same_is_refused(tmp_path: Path) -> None:
    """Falcon's layers read their rate from the config, and recomputed layers are in training mode."""
    model_of("falcon", hidden_dropout=0.3).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), dtype=torch.float32, gradient_checkpointing=True)
    with pytest.raises(UserError, match="is random: two passes over the same tokens"):
        check_rows(model, torch.device("cpu"))
    check_rows(load_causal_lm(str(tmp_path), dtype=torch.float32), torch.device("cpu"))


def test_checkpointing_of_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    model_of("ctrl").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gradient_checkpointing: CTRLLMHeadModel does not support it"):
        load_causal_lm(str(tmp_path), dtype=torch.float32, gradient_checkpointing=True)


def test_a_new_critic_values_everything_at_zero_and_a_reward_model_has_a_head(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tiny_model} .*it has no reward head"):
        load_reward_model(str(tiny_model), dtype=torch.float32)
    head = torch.full((1, load_model_config(str(tiny_model)).hidden_size), 0.5)
    model = load_critic(str(tiny_model), dtype=torch.float32)
    assert torch.equal(model.score.weight, torch.zeros_like(head))
    model.score.weight.data.copy_(head)
    model.save_pretrained(tmp_path / "reward")
    assert torch.equal(load_reward_model(str(tmp_path / "reward"), dtype=torch.float32).score.weight, head)
    assert torch.equal(load_critic(str(tmp_path / "reward"), dtype=torch.float32).score.weight, head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_models_adapter_scores_as_the_folded_model(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    adapter = make_reward_adapter(tmp_path / "adapter", tiny_model, seed=1)
    fold = MergeConfig.model_validate({"method": "fold", "models": {"a": {"model": str(adapter)}}, "dtype": dtype})
    merge_models(fold, tmp_path / "folded", quiet=True)
    tokens, lengths = torch.arange(12), torch.tensor([5, 7])
    scores = []
    for folder in (adapter, tmp_path / "folded"):
        model = load_reward_model(str(folder), dtype=getattr(torch, dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        scores.append(sequence_scores(model, tokens, lengths))
    assert torch.equal(*scores)
    assert scores[0][0] != scores[0][1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("language model", "task_type CAUSAL_LM: it has no reward head"),
        ("two labels", "LoRA adapter with 2 labels: it has no reward head"),
        ("no head", "LoRA adapter without a head, as is its base .*: it has no reward head"),
        ("other base", r"does not fit .*: .* has shape \[96, 4\], but the model needs \[48, 4\]"),
        ("cut", r"adapter_model.safetensors cannot be read"),
        ("no base", "base_model_name_or_path is None, so the base model is unknown"),
    ],
)
def test_an_adapter_that_gives_no_score_is_refused(tiny_model: Path, tmp_path: Path, kind: str, message: str) -> None:
    adapter = tmp_path / "adapter"
    if kind == "language model":
        make_adapter(adapter, tiny_model, seed=1)
    else:
        make_reward_adapter(adapter, tiny_model, seed=1, num_labels=2 if kind == "two labels" else 1)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if kind == "no head":
        save_file({name: one for name, one in load_file(file).items() if ".lora_" in name}, file)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif kind in ("other base", "no base"):
        base = str(changed_copy(tiny_model, tmp_path / "narrow", hidden_size=48)) if kind == "other base" else None
        change_json(config, base_model_name_or_path=base)
    for check in (refuse_without_head, partial(load_reward_model, dtype=torch.float32)):
        with pytest.raises(UserError, match=message):
            check(str(adapter))


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
    path = str(changed_copy(tiny_model, tmp_path / "m", **changes))
    message = rf"{path} is a .*, not a causal language model: it has no head"
    with nullcontext() if is_language_model else pytest.raises(UserError, match=message):
        refuse_no_language_model(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *((path, "does not exist") for path in ("./no/such/folder", "/no/such/folder", "a/b/c")),
        ("no-owner/no-such-model", r"no-owner/no-such-model .*HF_HUB_OFFLINE"),
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            r"Make models/SmolLM2-135M-Instruct with `rlhf models fetch smollm2`, and name this folder\.$",
        ),
    ],
)
def test_a_missing_folder_or_hub_is_named(path: str, message: str) -> None:
    for load in (load_tokenizer, partial(load_causal_lm, dtype=torch.float32)):
        with pytest.raises(UserError, match=message):
            load(path)


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
    load = load_model_config if file == "config.json" else load_tokenizer
    with pytest.raises(UserError, match=r"m cannot be loaded \(.*: .*\): a file of it is damaged\. Get it again"):
        load(str(tmp_path / "m"))


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(UserError, match=r"is an adapter, and this needs a whole model.*`adapter` beside `model`"):
        load_model_config(str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.resolved.yaml").write_text("")
    with pytest.raises(UserError, match="is the folder of a run, not a model: it has no final/"):
        load_model_config(str(run))
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
    own = architecture_fingerprint(load_model_config(str(tiny_model)))
    copy = str(changed_copy(tiny_model, tmp_path / "copy", use_cache=False, dtype="bfloat16", transformers_version="0"))
    assert architecture_fingerprint(load_model_config(copy)) == own
    assert architecture_fingerprint(load_causal_lm(copy, dtype=torch.bfloat16).config) == own
    other = str(changed_copy(tiny_model, tmp_path / "other", num_hidden_layers=2))
    assert architecture_fingerprint(load_model_config(other)) != own
