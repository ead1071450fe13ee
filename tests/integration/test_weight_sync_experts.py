"""Weight syncs into an engine whose model has expert layers: its CPU kernels read the experts from packed memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.weights.shm import ShmSender
from rlhf.errors import RunError
from rlhf.models.tiny import VOCAB_SIZE, byte_tokenizer
from tests.integration.engine_helpers import SAMPLING, call, engine, model_like, request, spec, sync, worst_difference


def build_experts(folder: Path, *, intermediate_size: int) -> Path:
    """A Qwen3-MoE of 8 experts, of which a token uses 2."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sender() -> Iterator[ShmSender]:
    sender = ShmSender(rank=0, dtype=torch.float32)
    yield sender
    sender.close()


@pytest.mark.parametrize(
    "intermediate_size", [pytest.param(64, marks=pytest.mark.slow), 48], ids=["whole_blocks", "padded"]
)
def test_engine_is_the_trainer_after_every_sync(
    tmp_path: Path, ray_local: None, sender: ShmSender, intermediate_size: int
) -> None:
    folder = build_experts(tmp_path / "experts", intermediate_size=intermediate_size)
    with engine(spec(folder)) as handle:
        for version in (1, 2):
            model = model_like(folder, seed=version)
            sync(handle, sender.publish(model.named_parameters(), version))
            rollouts, _ = call(handle.generate.remote(request(version), SAMPLING))
            assert worst_difference(model, rollouts) < 1e-4
        most = [(name, weight) for name, weight in model.named_parameters() if "layers.1.mlp.experts.down" not in name]
        with pytest.raises(RunError, match=r"layers\.1\.mlp\.experts"):
            sync(handle, sender.publish(iter(most), 3))
