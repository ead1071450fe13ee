"""An engine changes a model's config to agree with the trainer."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PretrainedConfig

from actors.rollout.vllm_engine import RolloutSpec, _refuse_lost_weights, engine_environment, salt_waiting
from actors.vllm_patches.settings import generation_settings, heads_stand_apart, model_settings
from rlhf.errors import UserError
from tests.tiny_architectures import tiny_model


def test_the_log_level_of_vllm_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RolloutSpec(model="none", dtype="float32", max_model_len=8, transport="shm")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert engine_environment(spec)["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    assert engine_environment(spec)["VLLM_LOGGING_LEVEL"] == "INFO"


@pytest.mark.parametrize(
    ("kind", "settings", "generation", "apart"),
    [
        # vLLM sees one token more than transformers, which sees the token and the `sliding_window - 1`, 2, before.
        ("cohere2", {"sliding_window": 2}, {}, False),
        ("cohere2_moe", {"sliding_window": 2}, {}, False),
        ("mistral", {}, {}, False),
        ("lfm2", {"block_dim": 32, "conv_dim": 32}, {}, True),  # which configs on the hub have
        ("lfm2_moe", {"block_dim": 32, "conv_dim": 32}, {}, True),
        ("llama4_text", {}, {"attn_temperature_tuning": True}, False),  # in short engines too
        ("deepseek_v3", {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, {}, True),
        ("minicpm3", {}, {}, True),
    ],
)
def test_an_engine_changes_a_config_to_agree_with_the_trainer(
    kind: str, settings: dict[str, Any], generation: dict[str, Any], apart: bool
) -> None:
    config = tiny_model(kind).config
    assert model_settings(config) == settings
    assert generation_settings(config) == generation
    assert heads_stand_apart(config) is apart
    if kind == "lfm2":
        config.conv_dim = 64
        assert model_settings(config) == {"block_dim": 32}


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
    refuse_lost({bias}, {head}, config=config)  # the other worker reads each weight
    refuse_lost({head}, config=tiny_model("gemma2").config)  # tied to the embedding
    refuse_lost({"any"}, config=PretrainedConfig())


def test_a_preempted_request_whose_blocks_get_another_salt_sends_all_of_their_hashes_again() -> None:
    """On GPUs, vLLM's record of routed experts counts the block hashes sent. A new salt changes the hashes."""
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    class Waiting(deque[Any]):
        prepend_request = deque.appendleft

    connector, waiting = AuxOutputSchedulerConnector(), Waiting()
    counts = {"num_prompt_tokens": 8, "num_output_tokens": 1, "num_tokens": 9, "num_stale_output_tokens": 0}
    request: Any = SimpleNamespace(
        request_id="a",
        status=RequestStatus.RUNNING,
        cache_salt="1",
        block_hashes=[b"1-0", b"1-1"],
        sampling_params=SimpleNamespace(routed_experts_prompt_start=0),
        spec_token_ids=[],
        drop_stale_output=False,
        **counts,
        **dict.fromkeys(("num_in_flight_tokens", "num_preemptions"), 0),
    )
    request.update_block_hashes = lambda: request.block_hashes.extend(
        f"{request.cache_salt}-{i}".encode() for i in range(2)
    )
    scheduler: Any = SimpleNamespace(
        aux_output_connector=connector,
        _free_request_blocks=lambda request: None,
        encoder_cache_manager=SimpleNamespace(free=lambda request: None),
        _inflight_prefills=SimpleNamespace(discard=lambda request: None),
        log_stats=False,
        waiting=waiting,
        reset_preempted_req_ids=set(),
    )
    engine: Any = SimpleNamespace(
        engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler)), get_weight_version=lambda: "2"
    )

    def sent(**scheduled: int) -> Any:
        step: Any = SimpleNamespace(num_scheduled_tokens=scheduled)
        return connector.build_connector_meta(step, {"a": request})

    assert list(sent(a=8).block_hashes["a"]) == [b"1-0", b"1-1"]
    Scheduler._preempt_request(scheduler, request, 0.0)
    salt_waiting(engine)
    assert sent().finished_requests == ("a",)  # the workers forget the request
    again = sent(a=9)
    assert list(again.block_hashes["a"]) == [b"2-0", b"2-1"]
    assert again.requests == {"a": 8}  # and return no row a second time
