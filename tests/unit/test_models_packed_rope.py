"""Every type of RoPE gives each sequence of a row the frequencies of the sequence alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf.errors import UserError
from rlhf.models.packed import row_check
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.rope import fix_frequencies
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout
from tests.fixtures.packed_models import own_logprobs
from tests.tiny_architectures import VOCABULARY, tiny_config

CPU = torch.device("cpu")
TRAINED = 16  # tokens; the context is 64, and heads have 4 frequencies
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": TRAINED,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "longrope": LONG,
    "llama3": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
CASES = {
    **{name: ("llama", values) for name, values in TYPES.items()},
    "longrope of Phi-3": ("phi3", LONG),
    "longrope of Phi-3.5-MoE": ("phimoe", LONG | {"short_mscale": 1.1, "long_mscale": 1.4}),
    "longrope by layer": ("gemma3_text", {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}),
    "dynamic with alpha": ("hunyuan_v1_dense", {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0}),
}


def model_with(kind: str, rope: dict[str, Any]) -> Any:
    config = tiny_config(kind)
    config.rope_parameters = copy.deepcopy(rope)
    parts = [config.rope_parameters] if "rope_type" in rope else [*config.rope_parameters.values()]
    for part in parts:
        part["rope_theta"] = 100.0
    if any(part["rope_type"] == "longrope" for part in parts):
        config.original_max_position_embeddings = TRAINED
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logprobs(model: Any, *sequences: Tensor) -> Tensor:
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = False
    with torch.no_grad():
        return policy_logprobs_only(model, torch.cat(sequences), lengths, mask=mask)


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def test_every_type_of_transformers_is_among_the_cases() -> None:
    assert set(TYPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("longest", [TRAINED, 40])
@pytest.mark.parametrize("name", CASES)
def test_packed_sequences_are_those_of_each_alone_and_the_longest_that_of_transformers(name: str, longest: int) -> None:
    """The longest sequence of a run is within the original length, or beyond."""
    kind, rope = CASES[name]
    if kind == "phimoe" and longest > TRAINED:
        rope = rope | {"short_factor": LONG["long_factor"]}  # vLLM uses long factors, transformers short
    model, theirs = model_with(*CASES[name]), model_with(kind, rope)
    before = model.config.to_dict()
    fix_frequencies(model, longest)
    assert check_rows(model, CPU) is RowLayout.SHARED_PROMPTS
    short, long = sequences(10, longest)
    alone = torch.cat([logprobs(model, short), logprobs(model, long)])
    torch.testing.assert_close(alone[10:], own_logprobs(theirs, [long]), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(logprobs(model, short, long), alone, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(logprobs(model, short), alone[:10], rtol=0.0, atol=0.0)  # no long factors remain
    assert model.config.to_dict() == before  # the config is exported


@pytest.mark.parametrize("name", CASES)
def test_without_a_known_longest_sequence_rows_that_depend_on_it_are_computed_one_by_one(name: str) -> None:
    model, theirs = model_with(*CASES[name]), model_with(*CASES[name])
    layout = check_rows(model, CPU)
    assert layout is (RowLayout.ONE_BY_ONE if "longrope" in name else RowLayout.SHARED_PROMPTS)
    both = sequences(10, TRAINED)
    torch.testing.assert_close(logprobs(model, *both), own_logprobs(theirs, both), rtol=0.0, atol=1e-5)


def test_ranks_that_share_rows_need_a_longest_sequence_to_pack_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known longest sequence fixes the frequencies, so that the sequences of a row can be packed."""
    monkeypatch.setattr(row_check, "current_group", object)
    model = model_with("phi3", LONG)
    with pytest.raises(UserError, match="sequence_parallel needs a model whose sequences can be packed"):
        check_rows(model, CPU)
    fix_frequencies(model, 1)
    assert check_rows(model, CPU) is RowLayout.SHARED_PROMPTS


@pytest.mark.parametrize("name", ["dynamic", "dynamic with alpha"])
def test_sequences_beyond_the_trained_length_of_dynamic_are_refused(name: str) -> None:
    model, context = model_with(*CASES[name]), 64
    with pytest.raises(UserError, match=r"may have 65 tokens, but the model .* takes at most 64"):
        fix_frequencies(model, context + 1)
    check_rows(model, CPU)
    for lengths in [(context + 1,), (10, context + 1)]:
        with pytest.raises(UserError, match="takes at most 64"):
            logprobs(model, *sequences(*lengths))
    assert logprobs(model, *sequences(context)).isfinite().all()


@pytest.mark.parametrize("longest", [TRAINED, 40])
def test_long_and_short_factors_are_those_of_the_engine(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine chooses factors by max_model_len, the longest sequence of a run."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as engine

    limits = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    monkeypatch.setattr(engine, "get_current_vllm_config", lambda: limits)
    shape = {"head_size": 8, "rotary_dim": 8, "max_position_embeddings": 64, "base": 100.0, "is_neox_style": True}
    settings = {name: value for name, value in LONG.items() if name != "rope_type"} | {"dtype": torch.float32}
    theirs = engine.Phi3LongRoPEScaledRotaryEmbedding(**shape, **settings)
    model = model_with("phi3", LONG)
    fix_frequencies(model, longest)
    rotary = model.model.rotary_emb
    q = torch.randn(longest, 8)
    turned, _ = theirs(torch.arange(longest), q, q.clone())
    cos, sin = rotary(q[None], torch.arange(longest)[None])
    half = torch.cat((-q[:, 4:], q[:, :4]), dim=-1)
    torch.testing.assert_close(q * cos[0] + half * sin[0], turned, rtol=0.0, atol=1e-5)
