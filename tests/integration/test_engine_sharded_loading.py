"""ZeRO-3 shards a model during loading: two ranks on gloo hold half each, and train like after plain loading.

In float32 the comparison is with ZeRO-0. In bfloat16 the stages round differently, so the comparison is with ZeRO-3
sharded after loading, bit for bit. Covered are the policy (tied and untied), the critic with a new head,
the reward model with a trained head, and LoRA. Not covered: GPUs, and a model larger than a rank's memory (the tests
count elements instead).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.engine.sharded_loading import shards_as_it_loads
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.loading import load_causal_lm, load_critic
from rlhf.models.packed.forward import policy_logprobs
from rlhf.models.packed.heads import token_values
from rlhf.models.reward_models import load_reward_model
from tests.integration.engine_training import weights_of
from tests.integration.rank_gang import Gang, engine_of, small_config

LENGTHS = torch.tensor([5, 3])
LOADERS = {"tied": load_causal_lm, "untied": load_causal_lm, "lora": load_causal_lm, "critic": load_critic}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    tied, untied = (small_config(vocab_size=41, tie_word_embeddings=is_tied) for is_tied in (True, False))  # odd
    LlamaForCausalLM(tied).save_pretrained(folder / "tied")
    LlamaForCausalLM(untied).save_pretrained(folder / "untied", max_shard_size="20KB")  # several files
    LlamaForSequenceClassification(untied).save_pretrained(folder / "reward")
    return folder


# What a rank does.


def load(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    if kind == "reward":
        return load_reward_model(str(folder / "reward"), dtype=dtype)
    return LOADERS[kind](str(folder / ("untied" if kind == "untied" else "tied")), dtype=dtype)


def loss_of(model: Any, rank: int, kind: str) -> Tensor:
    tokens = torch.arange(rank, rank + 16, 2)
    if kind in ("critic", "reward"):
        return (token_values(model, tokens, LENGTHS) - 1.0).square().sum() / 16
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    return -policy_logprobs(model, tokens, LENGTHS, mask=mask)[0].sum() / 12


def train(
    rank: int, world_size: int, *, kind: str, folder: Path, stage: int, sharded: bool, dtype: torch.dtype
) -> tuple[int, int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """Return (elements held, all elements; weights and buffers after loading, weights after a step; gradient norm)."""
    torch.manual_seed(rank)  # newly drawn weights must not depend on this seed
    with shards_as_it_loads(zero_stage=3 if sharded else 0, dtype=dtype):
        module = load(kind, folder, dtype)
    held = sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_id") else 0) for p in module.parameters())
    whole = sum(p.ds_numel if hasattr(p, "ds_id") else p.numel() for p in module.parameters())
    if kind == "lora":
        torch.manual_seed(rank)  # the same adapter at every stage
        module = add_lora(module, rank=4, alpha=8.0, dropout=0.0)
    engine = engine_of(module, stage=stage, dtype=dtype, optimizer=OptimizerSettings(lr=0.01, eps=1e-3))
    named = engine.named_adapter_weights if kind == "lora" else engine.named_weights
    before = weights_of(engine, dtype)
    engine.backward(engine.forward(loss_of, rank, kind), last=True)
    norm = engine.step().grad_norm
    after = {name: weight.clone() for name, weight in named(dtype)}
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine.close()
    return held, whole, before, buffers, after, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["tied", "untied", "critic", "reward", "lora"])
def test_a_rank_loads_its_share_and_trains_as_with_the_whole(
    gang: Gang, models: Path, kind: str, dtype: torch.dtype
) -> None:
    plain = load(kind, models, dtype)
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    count = sum(p.numel() for p in plain.parameters())
    other = 0 if dtype == torch.float32 else 3
    expected = gang.run(train, kind=kind, folder=models, stage=other, sharded=False, dtype=dtype)
    found = gang.run(train, kind=kind, folder=models, stage=3, sharded=True, dtype=dtype)
    for ours, theirs in zip(found, expected, strict=True):
        held, whole, before, buffers, after, norm = ours
        assert (theirs[0], theirs[1]) == (count, count)
        assert whole == count
        assert count / 2 <= held <= count / 2 + len(weights)  # an odd parameter's halves are padded
        assert before.keys() == weights.keys()
        assert all(torch.equal(before[name], weights[name]) for name in weights)  # LoRA starts as the identity
        assert all(torch.equal(buffers[name], theirs[3][name]) for name in theirs[3])
        assert {b.dtype for b in buffers.values()} == {b.dtype for b in theirs[3].values()}
        assert after.keys() == theirs[4].keys()
        rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (0.0, 0.0)
        torch.testing.assert_close(after, theirs[4], rtol=rtol, atol=atol)
        assert norm == pytest.approx(theirs[5], rel=rtol, abs=0.0)
