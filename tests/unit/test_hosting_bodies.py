"""JSON bodies of the official client become calls, and unsupported fields are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from rlhf.adapters import AdamStep, AdapterShape, SampleRequest
from rlhf.errors import UserError
from rlhf.hosting import bodies
from rlhf.hosting.images import ClientImages

NO_IMAGES = ClientImages(Path("none"), None)


def sample(params: types.SamplingParams, **options: Any) -> SampleRequest:
    asked = types.SampleRequest(
        prompt=types.ModelInput.from_ints([1, 2, 3]),
        sampling_params=params,
        sampling_session_id="s",
        seq_id=0,
        **options,
    )
    body = bodies.Sample.read(asked.model_dump_json(exclude_none=True).encode())
    return bodies.sample_request(body, NO_IMAGES, seed=77, max_length=20)


@pytest.mark.parametrize(
    ("stop", "texts", "tokens", "at_eos"),
    [
        (None, (), (), True),
        ([], (), (), False),
        ("END", ("END",), (), False),
        (["a", "b"], ("a", "b"), (), False),
        ([4, 5], (), (4, 5), False),
    ],
)
def test_stops(stop: Any, texts: tuple[str, ...], tokens: tuple[int, ...], at_eos: bool) -> None:
    made = sample(types.SamplingParams(stop=stop))
    assert (made.stop, made.stop_token_ids, made.ends_at_eos) == (texts, tokens, at_eos)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    params = types.SamplingParams(max_tokens=5, seed=3, temperature=0.5, top_k=7, top_p=0.25)
    made = sample(params, num_samples=4, prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=6)
    assert made == SampleRequest(
        token_ids=(1, 2, 3),
        num_samples=4,
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        seed=3,
        prompt_logprobs=True,
        top_prompt_logprobs=2,
        top_logprobs=6,
    )
    unset = sample(types.SamplingParams())
    assert (unset.max_tokens, unset.seed, unset.top_k) == (17, 77, None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k is not supported"),
        ({"record_stability_info": True}, "record_stability_info is not supported"),
        (
            {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}},
            "target_prompt_logprobs is not",
        ),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n needs prompt_logprobs"),
        ({"num_samples": 5000}, "num_samples: .* less than or equal to 4096"),
        ({"topk_sample_logprobs": 129}, "topk_sample_logprobs: .* less than or equal to 128"),
        ({"topk_prompt_logprobs": 129}, "topk_prompt_logprobs: .* less than or equal to 128"),
    ],
)
def test_unsupported_samples_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        sample(types.SamplingParams(), **options)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_tokens", 0, "greater than or equal to 1"),
        ("temperature", 2.5, "less than or equal to 2"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("top_p", 0.0, "greater than 0"),
        ("top_k", 2**31, "less than 2147483648"),
        ("stop", ["a", ""], "has an empty text"),
    ],
)
def test_impossible_sampling_parameters_are_named(name: str, value: Any, text: str) -> None:
    with pytest.raises(UserError, match=rf"sampling_params\.{name}: .*{text}"):
        sample(types.SamplingParams(**{name: value}))


def test_a_prompt_must_leave_room() -> None:
    whole = {"prompt": {"chunks": [{"tokens": [1] * 20}]}}
    with pytest.raises(UserError, match="has 20 tokens, and this server takes 1 to 19"):
        bodies.sample_request(bodies.Sample.read(json.dumps(whole).encode()), NO_IMAGES, seed=0, max_length=20)


def test_adam_and_no_other_optimizer() -> None:
    params = tinker.AdamParams(learning_rate=0.1, beta1=0.8, weight_decay=0.01, grad_clip_norm=2.0)
    asked = types.OptimStepRequest(optim_params=params, model_id="m", seq_id=1)
    made = bodies.adam_step(bodies.OptimStep.read(asked.model_dump_json().encode()))
    assert made == AdamStep(lr=0.1, betas=(0.8, 0.95), eps=1e-12, weight_decay=0.01, grad_clip=2.0)
    plain = bodies.OptimStep.read(b'{"model_id": "m", "seq_id": 1, "adam_params": {}}')
    assert bodies.adam_step(plain).grad_clip is None
    other = b'{"model_id": "m", "seq_id": 1, "optimizer_params": {"type": "dimuon", "learning_rate": 0.1}}'
    with pytest.raises(UserError, match="the optimizer dimuon is not supported here; use adamw"):
        bodies.adam_step(bodies.OptimStep.read(other))
    with pytest.raises(UserError, match=r"adam_params\.beta1: .* less than 1, got 1\.5"):
        bodies.OptimStep.read(b'{"model_id": "m", "seq_id": 1, "adam_params": {"beta1": 1.5}}')
    with pytest.raises(UserError, match=r"adam_params\.eps: .* greater than 0"):
        bodies.OptimStep.read(b'{"model_id": "m", "seq_id": 1, "adam_params": {"eps": 0.0}}')


def test_the_shape_of_an_adapter() -> None:
    lora = bodies.LoraBody(rank=4, train_mlp=False)
    assert bodies.adapter_shape(lora, seed=9) == AdapterShape(rank=4, mlp=False, seed=9)
    assert bodies.adapter_shape(bodies.LoraBody(rank=4, seed=2), seed=9).seed == 2
    assert bodies.adapter_shape(None, seed=9) == bodies.adapter_shape(bodies.LoraBody(rank=0), seed=9)
    assert bodies.adapter_shape(None, seed=9) == AdapterShape(rank=0)
    with pytest.raises(UserError, match="rank 0 trains all weights"):
        bodies.adapter_shape(bodies.LoraBody(rank=0, train_mlp=False), seed=0)
    with pytest.raises(UserError, match="nothing would be trained"):
        bodies.adapter_shape(bodies.LoraBody(rank=4, train_mlp=False, train_attn=False), seed=0)


def test_unknown_fields_and_names_are_refused() -> None:
    with pytest.raises(UserError, match="frobnicate: this server does not support the field"):
        bodies.SaveWeights.read(b'{"model_id": "m", "seq_id": 1, "frobnicate": 2}')
    with pytest.raises(UserError, match=r"the body: .*JSON"):
        bodies.SaveWeights.read(b"{")
    assert bodies.checkpoint_name(None, seq_id=12) == "seq000012"
    assert bodies.checkpoint_name("epoch-1.5_b", seq_id=1) == "epoch-1.5_b"
    for name in ("", "..", "a/b", "_1", "x" * 129, "a b"):
        with pytest.raises(UserError, match="must be 1 to 128 letters"):
            bodies.checkpoint_name(name, seq_id=1)
