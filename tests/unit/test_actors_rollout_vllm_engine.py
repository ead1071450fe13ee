"""What an engine changes of a model's config, so that vLLM computes what the trainer computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PretrainedConfig

from actors.rollout.vllm_engine import (
    RolloutSpec,
    _generation_settings,
    _heads_stand_apart,
    _model_settings,
    _refuse_lost_weights,
    engine_environment,
)
from rlhf.errors import UserError
from tests.tiny_architectures import tiny_model


def test_the_log_level_of_vllm_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RolloutSpec(model="none", dtype="float32", max_model_len=8, transport="shm")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert engine_environment(spec)["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    assert engine_environment(spec)["VLLM_LOGGING_LEVEL"] == "INFO"


def test_windows_of_cohere_are_those_of_the_trainer() -> None:
    """vLLM sees one token more than transformers, which sees the token itself and the `sliding_window - 1` before."""
    assert tiny_model("cohere2").config.sliding_window == 3
    assert _model_settings(tiny_model("cohere2").config) == {"sliding_window": 2}
    assert _model_settings(tiny_model("cohere2_moe").config) == {"sliding_window": 2}
    assert _model_settings(tiny_model("mistral").config) == {}


def test_settings_of_models_on_the_hub_are_added_where_a_config_lacks_them() -> None:
    config = tiny_model("lfm2").config
    assert _model_settings(config) == {"block_dim": 32, "conv_dim": 32}
    config.conv_dim = 64
    assert _model_settings(config) == {"block_dim": 32}


def test_llama_4_scales_its_queries_in_short_engines_too() -> None:
    assert _generation_settings(tiny_model("llama4_text").config) == {"attn_temperature_tuning": True}
    assert _generation_settings(tiny_model("llama").config) == {}


@pytest.mark.parametrize(
    ("kind", "apart"), [("lfm2", True), ("lfm2_moe", True), ("deepseek_v3", True), ("minicpm3", True), ("llama", False)]
)
def test_models_whose_heads_stand_apart_turn_them_by_torch(kind: str, apart: bool) -> None:
    assert _heads_stand_apart(tiny_model(kind).config) is apart


def refuse_lost(*unread_by_worker: set[str], config: Any) -> None:
    engine: Any = SimpleNamespace(collective_rpc=lambda _: [frozenset(names) for names in unread_by_worker])
    spec = RolloutSpec(model="folder", dtype="float32", max_model_len=8, transport=None)
    _refuse_lost_weights(engine, spec, config)


def test_an_engine_that_has_lost_weights_is_refused() -> None:
    config = tiny_model("laguna").config
    bias, head = "model.layers.1.mlp.experts.e_score_correction_bias", "lm_head.weight"
    with pytest.raises(UserError, match=rf"not loaded 1 weights of folder, such as {bias}.* type laguna"):
        refuse_lost({bias, "mtp.layers.0.weight"}, {bias, head}, config=config)
    refuse_lost({"mtp.layers.0.weight"}, config=config)  # no weight of the language model
    refuse_lost({bias}, {head}, config=config)  # each is read by the other worker
    refuse_lost({head}, config=tiny_model("gemma2").config)  # tied to the embedding
    refuse_lost({"any"}, config=PretrainedConfig())
