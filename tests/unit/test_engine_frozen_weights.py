"""The frozen base of an adapter has a checksum, in one process.

tests/integration/test_engine_adapters.py shards the weights with an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.engine.frozen_weights import digest_of_base, digest_over_ranks
from rlhf.engine.partitions import Sharding
from rlhf.models.adapters.lora import add_lora


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return add_lora(LlamaForCausalLM(config), rank=2, alpha=4.0, dropout=0.0, init="pissa")


def test_the_checksum_is_that_of_the_base_alone() -> None:
    model = adapted()
    before = digest_of_base(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # what is trained, and the copies
                parameter.add_(1.0)
        assert digest_of_base(model) == before
        model.model.layers[0].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    assert digest_of_base(model) != before


def test_the_checksum_that_other_ranks_would_have() -> None:
    model = adapted()
    digests = []
    for rank in range(3):  # with shares as at stage 3, and padding that is no zero
        for parameter in model.parameters():
            size = -(-parameter.numel() // 3)
            share = torch.full((size,), float("nan"))
            own = parameter.detach().reshape(-1)[rank * size : (rank + 1) * size]
            share[: len(own)] = own
            parameter.ds_tensor, parameter.ds_numel = share, parameter.numel()
        with mock.patch("torch.distributed.get_rank", return_value=rank):
            digests.append(digest_of_base(model))
        for parameter in model.parameters():
            del parameter.ds_tensor, parameter.ds_numel
    assert digest_over_ranks(model, Sharding(ranks=3, zero_stage=3)) == sum(digests)
    assert digest_over_ranks(model, Sharding(ranks=2, zero_stage=2)) == 2 * digest_of_base(model)
