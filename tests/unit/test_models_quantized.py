"""A base in 4 bits computes near its weights, carries an adapter, and merges with the adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models.adapters.lora import adapter_disabled, add_lora
from rlhf.models.files.loading import (
    architecture_fingerprint,
    load_causal_lm,
    load_critic,
    load_model_config,
    load_tokenizer,
)
from rlhf.models.quantized import dequantized, is_quantized, refuse_unquantizable
from tests.fixtures.models import logits, moved, save_model

TOKENS = torch.arange(9)[None]
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small model whose weights are whole blocks."""
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    load_tokenizer(str(tiny_model)).save_pretrained(folder)
    return folder


def test_a_missing_package_or_uneven_rows_on_a_cpu_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = load_model_config(str(tiny_model))  # 96 wide
    refuse_unquantizable("policy.lora.quantize", uneven, device="cuda")
    with pytest.raises(UserError, match="linear layers 96 wide, and on a CPU bitsandbytes needs a multiple of 64"):
        refuse_unquantizable("policy.lora.quantize", uneven, device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"policy.lora.quantize: is nf4, but bitsandbytes.*ray-rlhf\[qlora\]"):
        refuse_unquantizable("policy.lora.quantize", CONFIG, device="cpu")


def test_the_layers_but_the_head_and_what_they_compute(base: Path) -> None:
    refuse_unquantizable("policy.lora.quantize", CONFIG, device="cpu")
    plain = load_causal_lm(str(base), dtype=torch.float32)
    model = load_causal_lm(str(base), dtype=torch.float32, quantize="nf4")
    assert is_quantized(model)
    assert not is_quantized(plain)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert len(stored) == 7 * model.config.num_hidden_layers
    assert all("_proj." in name for name in stored)
    assert architecture_fingerprint(model.config) == architecture_fingerprint(plain.config)
    for name, parameter in model.named_parameters():
        assert dequantized(parameter).shape == plain.get_parameter(name).shape
        assert dequantized(plain.get_parameter(name)) is plain.get_parameter(name)
    weight = plain.model.layers[0].self_attn.q_proj.weight
    error = (dequantized(model.model.layers[0].self_attn.q_proj.weight) - weight).abs()
    assert 0 < error.max() < 0.16 * weight.abs().max()  # half the widest gap of nf4, 0.30 of a block's largest weight


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True, "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_off_and_merged(base: Path, tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = load_causal_lm(str(base), dtype=dtype, quantize="nf4")
    before = logits(model, TOKENS).float()
    model = add_lora(model, rank=4, alpha=8.0, dropout=0.0, **options)
    assert torch.equal(logits(model, TOKENS).float(), before)
    model(TOKENS).logits.float().square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    moved(model)
    after = logits(model, TOKENS).float()
    with adapter_disabled(model):
        assert torch.equal(logits(model, TOKENS).float(), before)
    merged = load_causal_lm(str(save_model(model, tmp_path / "m", base, dtype=dtype)), dtype=dtype)
    assert not is_quantized(merged)
    torch.testing.assert_close(
        logits(merged, TOKENS).float(), after, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
    )
    assert (after - before).abs().max() > 0.3


def test_a_critic_keeps_its_head_whole(base: Path) -> None:
    critic = load_critic(str(base), dtype=torch.float32, quantize="nf4")
    assert is_quantized(critic)
    assert critic.score.weight.dtype == torch.float32
