"""The adapter: exact when off, merged as peft merges it, named as peft names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.export import export_adapter, export_model
from rlhf.models.loading import load_causal_lm, load_critic, load_tokenizer
from rlhf.models.lora import adapter_disabled, add_lora, starts_as_identity
from rlhf.models.packed import hidden_states
from rlhf.models.weights import adapter_sources, weight_sources

TOKENS, LENGTHS = torch.arange(7), torch.tensor([3, 4])


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        return hidden_states(model, TOKENS, LENGTHS)


def with_trained_adapter(path: Path) -> Any:
    model = add_lora(load_causal_lm(str(path), dtype=torch.float32), rank=4, alpha=8.0, dropout=0.0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def test_off_is_the_model_before(tiny_model: Path) -> None:
    before = hidden(load_causal_lm(str(tiny_model), dtype=torch.float32))
    model = with_trained_adapter(tiny_model)
    trainable = [p.requires_grad for p in model.parameters()]
    assert not torch.allclose(hidden(model), before, atol=1e-3)
    with adapter_disabled(model):
        assert torch.equal(hidden(model), before)
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert not torch.allclose(hidden(model), before, atol=1e-3)


def test_only_the_adapter_is_trained_and_it_starts_as_the_identity(tiny_model: Path) -> None:
    base = load_causal_lm(str(tiny_model), dtype=torch.float32)
    before = hidden(base)
    model = add_lora(base, rank=4, alpha=8.0, dropout=0.0)
    assert {name.split(".lora_")[1][0] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    assert starts_as_identity(model)
    assert torch.equal(hidden(model), before)
    assert not starts_as_identity(with_trained_adapter(tiny_model))


def test_exported_adapter_loads_in_peft(tiny_model: Path, tmp_path: Path) -> None:
    model = with_trained_adapter(tiny_model)
    weights = ((source.name, source.make()) for source in adapter_sources(model))
    export_adapter(tmp_path / "adapter", weights, model, load_tokenizer(str(tiny_model)))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = loaded.base_model.model.model(TOKENS[None, :3]).last_hidden_state[0]
    torch.testing.assert_close(hidden(model)[:3], expected, rtol=1e-4, atol=1e-5)


def test_merged_export_is_the_adapted_model(tiny_model: Path, tmp_path: Path) -> None:
    model = with_trained_adapter(tiny_model)
    weights = ((source.name, source.make()) for source in weight_sources(model))
    export_model(tmp_path / "m", weights, model.config, load_tokenizer(str(tiny_model)), dtype=torch.float32)
    merged = load_causal_lm(str(tmp_path / "m"), dtype=torch.float32)
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=1e-4, atol=1e-5)


def test_a_critic_keeps_its_head_trainable(tiny_model: Path) -> None:
    critic = add_lora(load_critic(str(tiny_model), dtype=torch.float32), rank=2, alpha=4.0, dropout=0.0)
    assert critic.score.weight.requires_grad
    assert "base_model.model.score.weight" in {source.name for source in adapter_sources(critic)}


def test_chosen_layers_only(tiny_model: Path) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    adapted = add_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize("names", [["w_proj"], ["q_proj", "w_proj"]])
def test_an_unknown_layer_is_refused(tiny_model: Path, names: list[str]) -> None:
    model = load_causal_lm(str(tiny_model), dtype=torch.float32)
    with pytest.raises(UserError, match="w_proj"):
        add_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=names)


def test_no_adapter_no_adapter_weights(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA adapter"):
        adapter_sources(load_causal_lm(str(tiny_model), dtype=torch.float32))
