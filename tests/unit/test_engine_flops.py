"""Operations of a training pass, counted by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from rlhf.engine.flops import flops_per_token, measure_peak_flops

SIZES = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("tied", [True, False])
def test_counts_by_hand(tied: bool) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    # a layer: q 64, k 8*4 = 32, v 32, o 64, three of 8*20 = 480, two norms 16; together 688. With the last norm 8 and
    # the head 800: 2 * 688 + 808 = 2184. Attention: 6 * 2 layers * 4 heads * 2 * 50 tokens = 4800.
    assert flops_per_token(config, 50) == 6 * 2184 + 4800


def test_the_chosen_experts_of_a_mixture_count() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=2)
    # a layer: attention 192, router 4*8 = 32, two of four experts of 480 each, two norms 16; together 1200
    assert flops_per_token(config, 0) == 6 * (2 * 1200 + 808)


@pytest.mark.timeout(60)
def test_the_peak_is_a_rate_measured_without_random_numbers_of_the_run() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert measure_peak_flops(torch.float32, torch.device("cpu"), repeats=0, side=1024) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
