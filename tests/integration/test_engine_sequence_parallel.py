"""Ulysses for real, on gloo: four ranks that share each micro-batch, or two by two, agree with plain torch on one rank.

Logprobs, entropies, values, losses, gradients and trained weights must agree with whole rows: with sequences of uneven
lengths, rows with uneven splits, shared prompts, parts without a trained token, fewer key-value heads than ranks,
recomputed layers, and weights with or without sharding (ZeRO-3). Not covered: nccl.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.engine.deepspeed import DeepSpeedEngine
from rlhf.engine.training_engine import OptimizerSettings
from rlhf.errors import UserError
from rlhf.models.files.loading import enable_checkpointing
from rlhf.models.packed.branches import Branch, Branches
from rlhf.models.packed.forward import policy_logprobs, policy_logprobs_only, supervised_loss
from rlhf.models.packed.heads import sequence_scores, token_values
from tests.integration.rank_gang import Gang, Gangs, engine_of, small_config

WORLD = 4
STEPS = 2
LR = 0.01
EPS = 1e-3  # of Adam: a step then follows the gradient, also where that is near 0 and rounding has its say
DEEP = (None, Branch(of=0, length=2), Branch(of=1, length=4), Branch(of=2, length=6), None, Branch(of=4, length=1))
# (lengths, branches, tokens that are learnt from). 14 and 11 tokens: neither splits into four, one not into two.
ROWS: list[tuple[list[int], Branches | None, list[int]]] = [
    ([4, 3, 2, 1, 2, 2], DEEP, [3, 4, 5, 6, 8, 9, 11, 12, 13]),
    ([6, 1, 4], None, [9, 10]),
]
Found = tuple[Tensor, list[Tensor]]  # the loss, and the columns from which it is computed


def model_of(kind: str, *, checkpointing: bool) -> Any:
    """Four heads for four ranks, but two key-value heads."""
    torch.manual_seed(0)
    loader = AutoModelForSequenceClassification if kind == "critic" else AutoModelForCausalLM
    model = loader.from_config(small_config()).train()
    if checkpointing:
        enable_checkpointing(model)
    return model


def forward(model: Any, kind: str, step: int, index: int) -> Found:
    lengths, branches, learnt = ROWS[index]
    generator = torch.Generator().manual_seed(10 * step + index)
    tokens = torch.randint(40, (sum(lengths),), generator=generator)
    weights = torch.randn(len(tokens), generator=generator) / 10
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[learnt] = True
    sizes = torch.tensor(lengths)
    if kind == "policy":
        logprobs, entropy = policy_logprobs(
            model, tokens, sizes, mask=mask, branches=branches, temperature=0.7, entropy_grad=True
        )
        with torch.no_grad():
            again = policy_logprobs_only(model, tokens, sizes, mask=mask, branches=branches, temperature=0.7)
        return (weights * logprobs).sum() - (weights * entropy).square().sum(), [logprobs, entropy, again]
    if kind == "supervised":
        mask &= torch.tensor([i not in (0, 5, 8) for i in range(len(tokens))])
        if branches is not None:
            sizes = torch.tensor([5, 9])  # such rows have no branches
        loss, *columns = supervised_loss(model, tokens, sizes, mask=mask, token_weight=0.1)
        return loss, columns
    values = token_values(model, tokens, sizes, branches)
    scores = sequence_scores(model, tokens, sizes)
    return (values - weights).square()[mask].sum() + (weights[: len(scores)] * scores).sum(), [values, scores]


Trained = tuple[list[list[Tensor]], list[Tensor], dict[str, Tensor], list[float], dict[str, Tensor]]


def plainly(kind: str) -> Trained:
    """Return (columns, losses, the last gradient, gradient norms, weights) of plain torch on whole rows."""
    model = model_of(kind, checkpointing=False)
    groups = [{"params": [p], "weight_decay": 0.01 if p.dim() == 2 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    columns, losses, norms = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(len(ROWS)):
            loss, found = forward(model, kind, step, index)
            loss.backward()
            losses.append(loss.detach())
            columns.append([x.detach() for x in found])
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return columns, losses, gradients, norms, {name: p.detach() for name, p in model.named_parameters()}


def in_parts(rank: int, world_size: int, *, kind: str, shared: int, stage: int, checkpointing: bool) -> Trained:
    """Return the same results of one rank among `shared` ranks of a row. The rows are divided among the groups."""
    engine = make_engine(model_of(kind, checkpointing=checkpointing), shared=shared, stage=stage)
    groups = world_size // shared
    mine = range(len(ROWS))[rank // shared :: groups]
    columns, losses, norms = [], [], []
    for step in range(STEPS):
        for index in mine:
            loss, found = engine.forward(forward, kind, step, index)
            engine.backward(loss, last=index == mine[-1])
            losses.append(loss.detach())
            columns.append([x.detach() for x in found])
        gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}
        norms.append(engine.step().grad_norm)
    weights = {name: weight.clone() for name, weight in engine.named_weights(torch.float32)}
    engine.close()
    return columns, losses, gradients, norms, weights


def make_engine(model: Any, *, shared: int, stage: int) -> DeepSpeedEngine:
    optimizer = OptimizerSettings(lr=LR, eps=EPS, weight_decay=0.01, grad_clip=None)
    return engine_of(model, stage=stage, optimizer=optimizer, sequence_parallel=shared)


def refusal(rank: int, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        make_engine(model_of("policy", checkpointing=False), shared=3, stage=0)
    return str(caught.value)


@pytest.fixture
def gang(gangs: Gangs) -> Gang:
    return gangs[WORLD]


@pytest.mark.parametrize(
    ("kind", "shared", "stage", "checkpointing"),
    [
        ("policy", 4, 0, False),
        ("policy", 2, 0, True),
        ("policy", 4, 3, True),
        ("supervised", 2, 3, False),
        ("critic", 4, 0, False),
        ("critic", 2, 2, False),
    ],
)
def test_ranks_that_share_rows_equal_one_that_does_not(
    gang: Gang, kind: str, shared: int, stage: int, checkpointing: bool
) -> None:
    columns, losses, gradients, norms, weights = plainly(kind)
    assert norms[0] > 0.05
    found = gang.run(in_parts, kind=kind, shared=shared, stage=stage, checkpointing=checkpointing)
    groups = WORLD // shared
    for rank, (own_columns, own_losses, own_gradients, own_norms, own_weights) in enumerate(found):
        rows = [i for step in range(STEPS) for i in range(2 * step, 2 * step + 2)[rank // shared :: groups]]
        for row, got, loss in zip(rows, own_columns, own_losses, strict=True):
            torch.testing.assert_close(got, columns[row], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loss, losses[row], rtol=1e-4, atol=1e-5)
        assert own_norms == pytest.approx(norms, rel=1e-4)
        if stage == 0:
            torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own_weights, weights, rtol=1e-4, atol=1e-5)


def test_heads_that_cannot_be_shared_out_are_refused(gang: Gang) -> None:
    for message in gang.run(refusal):
        assert message == "sequence_parallel is 3 and must divide the model's 4 attention heads."
