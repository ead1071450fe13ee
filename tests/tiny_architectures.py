"""Build tiny random language models of many architectures of transformers, with weights large enough for
comparisons.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 61
_BY_SIZE: dict[int | None, tuple[str, ...]] = {
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts"),
        *("n_routed_experts", "qk_nope_head_dim", "qk_rope_head_dim", "mamba_n_heads", "mamba_num_heads"),
        *("linear_num_value_heads", "linear_num_heads"),
    ),
    8: (
        *("head_dim", "v_head_dim", "mamba_d_state", "mamba_chunk_size", "ssm_state_size", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_head_dim", "hidden_size_per_layer_input", "rotary_dim"),
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_key_value_heads", "num_experts_per_tok", "moe_topk"),
        *("zero_expert_num", "mamba_expand", "linear_num_key_heads"),
    ),
    16: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("shared_intermediate_size", "expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "mamba_d_head"),
        "mamba_head_dim",
    ),
    32: ("hidden_size", "d_model", "n_embd", "lru_width"),
    48: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    1: ("n_group", "topk_group", "mamba_n_groups"),
    None: ("pad_token_id", "bos_token_id", "eos_token_id"),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    0: ("num_kv_shared_layers",),
}
_SIZES: dict[str, Any] = {name: size for size, names in _BY_SIZE.items() for name in names}
_HYBRID = ["linear_attention", "full_attention"]
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
_MLA = {"head_dim": 4, "num_key_value_heads": 4}
_SPARSE = _MLA | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_WITHOUT_HEAD_DIM: dict[str, Any] = {"head_dim": ...}  # `...` leaves the default

_PLAIN = (
    *("cohere", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granitemoe", "llama"),
    *("minimax_m2", "mixtral", "nemotron", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "seed_oss", "smollm3", "stablelm"),
)
_SELDOM_PLAIN = (
    *("afmoe", "apertus", "arcee", "biogpt", "bitnet", "diffllama", "ernie4_5", "ernie4_5_moe", "flex_olmo"),
    *("gpt_bigcode", "granite_swa", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jetmoe", "laguna", "mellum", "mimo_v2_flash", "ministral"),
    *("ministral3", "nanochat", "olmo", "persimmon", "solar_open", "vaultgemma"),
)
# By layout that is right: model type, and what differs from the sizes above.
SHARES_PROMPTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in (*_PLAIN, *_SELDOM_PLAIN)},
    "axk1": _MLA | {"first_k_dense_replace": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere2": _WINDOWS,
    "cohere2_moe": _WINDOWS,
    "ctrl": {"n_layer": 2, "dff": 48},
    "cwm": _WINDOWS | {"bos_token_id": 1},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA | {"first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "exaone4": _WINDOWS,
    "exaone_moe": _WINDOWS | {"mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "lm_head_multiplier": 0.25},
    "falcon_mamba": {"state_size": 8},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": _WINDOWS,
    "gemma3n_text": _WINDOWS | {"activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4},
    "gemma4_text": _WINDOWS | {"global_head_dim": 8},
    "glm4_moe_lite": _MLA | {"mlp_layer_types": ["dense", "sparse"]},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granitemoehybrid": {"layer_types": _HYBRID, "shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": _MLA | {"layer_types": _HYBRID, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": 4, "no_rope_layers": [1, 0], "floor_scale": 2},
    "longcat_flash": _MLA | {"num_layers": 1, "head_dim": 4},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minicpm3": _MLA,
    "minimax": {"layer_types": _HYBRID},
    "mistral": {"sliding_window": 3},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"], "n_groups": 1, "chunk_size": 8},
    "olmo3": _WINDOWS,
    "olmo_hybrid": {"layer_types": _HYBRID},
    "opt": {"word_embed_proj_dim": 32},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "recurrent_gemma": {"attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "starcoder2": {"sliding_window": 3},
    "youtu": _MLA,
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
PACKS: dict[str, dict[str, Any]] = {
    "codegen": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    "gpt_neox_japanese": {},
    "gptj": {},
}
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "bloom": {},
    "deepseek_v32": _SPARSE | {"first_k_dense_replace": 1},
    "doge": {},
    "falcon": _WITHOUT_HEAD_DIM | {"alibi": True},
    "glm_moe_dsa": _SPARSE | {"mlp_layer_types": ["dense", "sparse"]},
    "mpt": {},
    "openai-gpt": {},
    "rwkv": {},
    "xglm": {},
}
ALL = SHARES_PROMPTS | PACKS | ONE_BY_ONE
# Seldom trained, or like another type as far as tests can see: their tests are slow ones.
SELDOM = frozenset(
    (
        *_SELDOM_PLAIN,
        *("axk1", "codegen", "ctrl", "cwm", "deepseek_v2", "dots1", "exaone_moe", "falcon_mamba", "gpt_neo"),
        *("gpt_neox_japanese", "longcat_flash", "minicpm3", "mpt", "openai-gpt", "rwkv", "xglm", "youtu", "zaya"),
    )
)


def has_setting(config: Any, key: str) -> bool:
    """Return whether a config has a setting. A setting that differs by layer is no attribute."""
    return key in vars(config) or hasattr(config, key)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of two small layers."""
    kind = CONFIG_MAPPING[model_type]
    known = kind()
    wanted = {key: value for key, value in _SIZES.items() if has_setting(known, key)} | copy.deepcopy(ALL[model_type])
    return kind(**{key: value for key, value in (wanted | changes).items() if value is not ...})


def tiny_model(model_type: str, *, std: float = 0.1, **changes: Any) -> Any:
    """Return a language model in training mode, with normally distributed matrices."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
    return model
