"""A mixture of experts of the quickstart's size, as a folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from rlhf.models.tiny import MAX_LENGTH, VOCAB_SIZE, byte_tokenizer
from tests.tiny_architectures import tiny_model

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_local_experts": 8,  # the name of the field
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": MAX_LENGTH,
}


def build_tiny_mixture(folder: Path) -> Path:
    """A Qwen3-MoE of random weights. A token passes two of eight experts, as wide as the tiny Llama's MLP."""
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("qwen3_moe", std=0.02, **SIZES, **ends)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
