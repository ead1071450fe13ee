"""Build a mixture of experts and a hybrid of the quickstart's size, as folders for transformers and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from rlhf.models.files.tiny import MAX_LENGTH, VOCAB_SIZE, byte_tokenizer
from tests.tiny_architectures import tiny_model

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 256,
    "head_dim": 32,  # vLLM's smallest on a CPU
    "max_position_embeddings": MAX_LENGTH,
}
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,  # the name of the field
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 128,
}


def build_tiny_mixture(folder: Path) -> Path:
    """A Qwen3-MoE of random weights. A token passes two of eight experts, as wide as the tiny Llama's MLP."""
    return _build(folder, "qwen3_moe", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **EXPERTS)


def build_tiny_hybrid(folder: Path) -> Path:
    """An LFM2 of random weights: short convolutions and attention layers in turn."""
    layers = ["conv", "full_attention", "conv", "full_attention"]
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return _build(folder, "lfm2", num_hidden_layers=4, **heads, layer_types=layers)


def _build(folder: Path, model_type: str, **sizes: Any) -> Path:
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(model_type, std=0.02, **SIZES, **sizes, **ends)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
