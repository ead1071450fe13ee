"""The balance loss of a mixture equals transformers' loss, for any packing and with shared prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf.errors import UserError
from rlhf.models.files.loading import enable_checkpointing
from rlhf.models.packed.branches import Branch, predecessors
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.models.routers.recording import RoutingRecord, routers_of, scores_of
from tests.fixtures.models import gradient_of
from tests.tiny_architectures import VOCABULARY, tiny_model

LENGTHS = [6, 3, 8]
MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "olmoe", "granitemoe", "minimax_m2", "phimoe"]
SCORED = ["afmoe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "hy_v3", "lfm2_moe", "longcat_flash", "minimax_m2"]


def sequences() -> list[Tensor]:
    ids = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return list(ids.split(LENGTHS))


def recorded(
    model: Any, row: list[Tensor], branches: list[Branch | None] | None = None, *, in_order: bool = True
) -> RoutingRecord:
    lengths = torch.tensor([len(ids) for ids in row])
    record = RoutingRecord(lengths, branches)
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    mask[predecessors(lengths, branches) < 0] = False
    with record.of(routers_of(model), in_order=in_order):
        policy_logprobs_only(model, torch.cat(row), lengths, mask=mask, branches=branches)
    return record


def test_the_loss_of_a_sequence_is_that_of_transformers_by_layer() -> None:
    model = tiny_model("qwen3_moe").eval()
    (ids,) = sequences()[2:]
    logits = model(ids[None], output_router_logits=True).router_logits
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    theirs = [load_balancing_loss_func((of_layer,), experts, top_k) / top_k for of_layer in logits]
    torch.testing.assert_close(recorded(model, [ids]).balance_loss(), torch.stack(theirs).mean())


@pytest.mark.parametrize("kind", SCORED)
def test_scores_are_those_by_which_the_router_weighs_its_experts(kind: str) -> None:
    model = tiny_model(kind).eval()
    router = routers_of(model)[-1]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    router.register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(sequences()[2][None])
    ((logits, weights, chosen),) = found
    ours = scores_of(router, logits).gather(1, chosen)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", MIXTURES)
def test_packing_and_shared_prompts_change_neither_loss_nor_gradient(kind: str) -> None:
    model = tiny_model(kind).eval()
    check_rows(model, torch.device("cpu"))
    first, second, third = sequences()
    second = torch.cat([first[:4], second])
    expected = torch.stack([recorded(model, [ids]).balance_loss() for ids in (first, second, third)]).sum()
    wanted = gradient_of(model, expected)
    shared = ([first, second[4:], third], [None, Branch(of=0, length=4), None])
    for row, branches in (([first, second, third], None), shared):
        packed = recorded(model, row, branches).balance_loss()
        torch.testing.assert_close(packed, expected)
        torch.testing.assert_close(gradient_of(model, packed), wanted, rtol=1e-3, atol=1e-6)


def test_recomputed_layers_give_the_same_gradient() -> None:
    model = tiny_model("qwen3_moe")
    wanted = gradient_of(model, recorded(model, sequences()).balance_loss())
    enable_checkpointing(model)
    torch.testing.assert_close(gradient_of(model, recorded(model, sequences()).balance_loss()), wanted)


def test_loads_count_every_choice_once() -> None:
    model = tiny_model("qwen3_moe").eval()
    first, second, third = sequences()
    loads = recorded(model, [first, second, third], [None, Branch(of=0, length=4), None], in_order=False).loads()
    assert len(loads) == model.config.num_hidden_layers
    tokens = sum(LENGTHS)
    assert [sum(layer) for layer in loads] == [tokens * model.config.num_experts_per_tok] * len(loads)
    assert all(len(layer) == model.config.num_experts for layer in loads)


def test_a_router_without_choices_is_refused() -> None:
    record = RoutingRecord(torch.tensor([2]), None)
    with (
        record.of((router := torch.nn.Linear(4, 2),), in_order=True),
        pytest.raises(UserError, match="Linear does not return the scores and the choices"),
    ):
        router(torch.ones(2, 4))
