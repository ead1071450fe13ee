"""Tiny random language models of many architectures of transformers, with weights large enough to tell them apart."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "rotary_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_HYBRID = ["linear_attention", "full_attention"]
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
_MLA = {"head_dim": 4, "num_key_value_heads": 4}
_WITHOUT_HEAD_DIM: dict[str, Any] = {"head_dim": ...}  # `...` leaves the default

# By layout that is right: model type, and what differs from the sizes above.
SHARES_PROMPTS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": _WINDOWS,
    "ctrl": {"n_layer": 2, "dff": 48},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA | {"first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": _WINDOWS,
    "gemma": {},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": _WINDOWS,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jetmoe": {},
    "llama": {},
    "minimax_m2": {},
    "ministral": {},
    "mistral": {"sliding_window": 3},
    "mixtral": {},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": 3},
    "vaultgemma": {},
}
PACKS: dict[str, dict[str, Any]] = {
    "codegen": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    "gpt_neox_japanese": {},
    "gptj": {},
}
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bloom": {},
    "doge": {},
    "falcon": _WITHOUT_HEAD_DIM | {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "lm_head_multiplier": 0.25},
    "falcon_mamba": {"state_size": 8},
    "gpt_oss": {},
    "granitemoehybrid": {"layer_types": _HYBRID, "shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {"layer_types": _HYBRID},
    "mpt": {},
    "nemotron": {},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "openai-gpt": {},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "recurrent_gemma": {"attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "rwkv": {},
    "stablelm": {},
    "xglm": {},
}
ALL = SHARES_PROMPTS | PACKS | ONE_BY_ONE


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of two small layers."""
    kind = CONFIG_MAPPING[model_type]
    known = kind()
    wanted = {key: value for key, value in _SIZES.items() if hasattr(known, key)} | copy.deepcopy(ALL[model_type])
    return kind(**{key: value for key, value in (wanted | changes).items() if value is not ...})


def tiny_model(model_type: str, *, std: float = 0.1, **changes: Any) -> Any:
    """A language model in training mode, its matrices normally distributed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
    return model
