"""Settings that make vLLM compute the same as transformers, in place of vLLM's own."""

from __future__ import annotations

from typing import Any


def model_settings(config: Any) -> dict[str, Any]:
    """Return the changes of a model's config that make vLLM agree with transformers."""
    from rlhf.models.files.hub_names import missing_settings

    settings = missing_settings(config)
    if config.model_type in ("cohere2", "cohere2_moe"):  # vLLM's windows are a token wider than transformers'
        settings["sliding_window"] = config.sliding_window - 1
    return settings


def generation_settings(config: Any) -> dict[str, Any]:
    """Return the changes of a generation config: below 32,769 tokens vLLM turns off Llama 4's scale of queries."""
    key = "attn_temperature_tuning"
    return {key: bool(getattr(config, key))} if hasattr(config, key) else {}


def heads_stand_apart(config: Any) -> bool:
    """Return whether queries reach vLLM's rotary embedding with a dimension for the heads, wrong on CPUs."""
    return has_mla(config) or config.model_type in ("lfm2", "lfm2_moe")


def has_mla(config: Any) -> bool:
    """Return whether the model has DeepSeek's attention, whose keys and values are compressed together."""
    return hasattr(config, "kv_lora_rank")
