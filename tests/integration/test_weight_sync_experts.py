"""Weights are synced into an engine with expert layers: the CPU kernels read the experts from packed memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actors.weights.shm import ShmSender
from rlhf.errors import RunError
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from rlhf.models.files.weights import weight_sources
from tests.integration.engine_helpers import SAMPLING, call, engine, model_like, request, spec, sync, worst_difference
from tests.tiny_architectures import tiny_model

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
DEEPSEEK = {"moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 64}
DEEPSEEK |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
EIGHT = {"num_experts": 8, "moe_intermediate_size": 48, "norm_topk_prob": True}
# A step in a random direction. With 0.3, attention without query norms is so sharp that float32 is up to
# 4e-4 nats off float64 (gpt-oss, in 1 sample of 32; Mixtral 1.5e-4). With 0.1, float32 is 2e-6 off.
STEP = 0.1
MIXTURES = {
    "padded": ("qwen3_moe", EIGHT),  # the kernels pad 48 columns to 64
    "whole_blocks": ("qwen3_moe", EIGHT | {"moe_intermediate_size": 64}),
    "mixtral": ("mixtral", {}),
    "glm4_moe": ("glm4_moe", {"moe_intermediate_size": 64, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 64}),
}


def build_experts(folder: Path, name: str) -> Path:
    """Write a mixture with 2 experts for each token. Routers' biases differ from zero."""
    kind, changes = MIXTURES[name]
    model = tiny_model(kind, std=0.02, **SIZES | changes)
    for module, buffer in model.named_buffers():
        if module.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0.0, 0.3, len(buffer)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def published(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in the form of a policy's publication."""
    return (weight for source in weight_sources(model) for weight in source.published())


@pytest.mark.parametrize(
    "name", ["padded", *(pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES if name != "padded")]
)
def test_engine_is_the_trainer_after_every_sync(tmp_path: Path, ray_local: None, sender: ShmSender, name: str) -> None:
    folder = build_experts(tmp_path / "experts", name)
    with engine(spec(folder)) as handle:
        for version in (1, 2):
            model = model_like(folder, seed=version, std=STEP)
            sync(handle, sender.publish(published(model), version))
            rollouts, _ = call(handle.generate.remote(request(version), SAMPLING))
            assert worst_difference(model, rollouts) < 1e-4
        if name == "gpt_oss":
            return  # its files have the experts stacked, so no single expert can be missing
        most = [(key, weight) for key, weight in published(model) if "layers.1." not in key or ".experts.1." not in key]
        with pytest.raises(RunError, match=r"layers\.1\..*experts"):
            sync(handle, sender.publish(iter(most), 3))
