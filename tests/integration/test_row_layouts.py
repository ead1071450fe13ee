"""A hybrid model in real DeepSpeed engines: a step depends on neither ranks, shards nor micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.engine.training_engine import OptimizerSettings
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.models.routers.recording import routers_of
from tests.integration.gang_workers import assert_equal, merged
from tests.integration.offline_training import train_rank
from tests.integration.rank_gang import CPU, Gangs, engine_of
from tests.tiny_architectures import tiny_model


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Linear attention in the first layer, attention in the second."""
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    tiny_model("qwen3_5_text", vocab_size=320, max_position_embeddings=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("algorithm", "zero_stage"), [("dpo", 3), ("process_reward_model", 2)])
def test_a_step_of_a_hybrid_depends_on_neither_ranks_nor_microbatches(
    gangs: Gangs, hybrid: str, tmp_path: Path, algorithm: str, zero_stage: int
) -> None:
    options = {"algorithm": {"name": algorithm}, "model": hybrid, "folder": str(tmp_path), "zero_stage": zero_stage}
    first, second = steps_of(gangs, **options)
    assert first[0]["update/grad_norm"] > 0
    assert_equal(first, second)


def steps_of(gangs: Gangs, **options: Any) -> list[list[dict[str, float]]]:
    """Return the metrics of each step, by 1 rank with large micro-batches and by 2 with small micro-batches."""
    found = []
    for ranks, tokens in ((1, 4096), (2, 64)):
        found.append(merged(gangs[ranks].run(train_rank, tokens=tokens, repeated=(), **options)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_balance_loss_of_a_mixture_depends_on_neither_ranks_nor_microbatches(gangs: Gangs, tmp_path: Path) -> None:
    folder = tmp_path / "mixture"
    tiny_model("qwen3_moe", vocab_size=320, max_position_embeddings=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    options = {"algorithm": {"name": "dpo"}, "model": str(folder), "folder": str(tmp_path), "zero_stage": 3}
    balanced = steps_of(gangs, balance_coef=5.0, **options)
    for found in balanced:
        del found[0]["preference/accuracy/mean"]  # the policy still equals the reference: margins are rounding
    assert_equal(*balanced)
    assert balanced[0][0]["update/router_balance_loss"] > 1.0
    assert 1.0 < balanced[0][0]["update/router_load"] <= 4.0
    assert 0.0 < balanced[0][0]["update/router_entropy"] < 1.0
    (plain, _) = steps_of(gangs, **options)
    assert "update/router_balance_loss" not in plain[0]
    assert balanced[0][0]["update/grad_norm"] != pytest.approx(plain[0]["update/grad_norm"], rel=0.01)


def layout(rank: int, world_size: int, *, model: str, **options: Any) -> str:
    engine = engine_of(tiny_model(model), optimizer=OptimizerSettings(lr=0.1), **options)
    try:
        with torch.no_grad():
            return str(int(engine.forward(check_rows, CPU)))
    except UserError as error:
        return str(error)


def test_shards_and_shared_rows_pass_the_check_and_shared_rows_of_a_hybrid_do_not(gangs: Gangs) -> None:
    assert gangs[2].run(layout, model="llama", stage=3) == ["2", "2"]
    assert gangs[2].run(layout, model="llama", stage=0, sequence_parallel=2) == ["2", "2"]
    for message in gangs[2].run(layout, model="qwen3_5_text", stage=0, sequence_parallel=2):
        assert "sequence_parallel needs a model whose sequences can be packed into one row" in message


def mixture_after(rank: int, world_size: int, *, zero_stage: int) -> list[dict[str, Tensor]]:
    """Return the whole weights after steps with different experts on ranks, and the weights held whole by the rank."""
    model = tiny_model("qwen3_moe", std=0.3)
    engine = engine_of(model, stage=zero_stage, optimizer=OptimizerSettings(lr=0.01))
    chosen: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda m, i, o: chosen.append(o[2])) for router in routers_of(model)]
    for step in range(6):
        drawn = torch.Generator().manual_seed(10 * step + rank)
        own = 30 * rank + torch.randint(30, (4 + 5 * rank,), generator=drawn)  # different tokens on each rank
        loss = -engine.forward(policy_logprobs_only, own, torch.tensor([len(own)]), mask=torch.arange(len(own)) > 0)
        engine.backward(loss.sum(), last=True)
        engine.step()
    for hook in hooks:
        hook.remove()
    held = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if getattr(parameter, "ds_persist", False) and parameter.numel()
    }
    weights = {name: weight.clone() for name, weight in engine.named_weights(torch.float32)}
    engine.close()
    return [weights, held, {"experts": torch.bincount(torch.cat(chosen).flatten(), minlength=4)}]


def test_ranks_whose_tokens_choose_other_experts_keep_equal_weights(gangs: Gangs) -> None:
    """The stages are 3, with small parameters whole on each rank, and 2."""
    first, second = gangs[2].run(mixture_after, zero_stage=3)
    assert not torch.equal(first[2]["experts"], second[2]["experts"])
    assert first[1], "no parameter was held whole"
    assert first[1].keys() == second[1].keys()
    for ours, theirs in zip(first[:2], second[:2], strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    unsharded, _, _ = gangs[2].run(mixture_after, zero_stage=2)[0]
    torch.testing.assert_close(first[0], unsharded, rtol=1e-3, atol=2e-4)  # one step changes a weight by 0.01
