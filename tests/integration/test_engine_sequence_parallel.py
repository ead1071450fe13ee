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
# (lengths, branches, tokens that are learnt from). 14 and 11 tokens: neither splits into four, one not into two.
ROWS: list[tuple[list[int], Branches | None, list[int]]] = [
    ([5, 3, 4, 2], (None, Branch(of=0, length=3), None, Branch(of=2, length=3)), [3, 4, 5, 6, 11, 12, 13]),
    ([6, 1, 4], None, [9, 10]),
]
Found = tuple[Tensor, list[Tensor]]  # the loss, and the columns it was made from


def model_of(kind: str, *, checkpointing: bool) -> Any:
    """Four heads for four ranks, but two key-value heads."""
    torch.manual_seed(0)
    config = small_config()
    loader = AutoModelForSequenceClassification if kind == "critic" else AutoModelForCausalLM
    model = loader.from_config(config).train()
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
        loss, logprobs, likeliest = supervised_loss(model, tokens, sizes, mask=mask, token_weight=0.1)
        return loss, [logprobs, likeliest]
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
    try:
        make_engine(model_of("policy", checkpointing=False), shared=3, stage=0)
    except UserError as error:
        return str(error)
    return ""


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


# Each row has the sequences of an agent's session. The first tree has five levels, and neither row splits into two.
TREES: list[tuple[list[int], list[Branch | None]]] = [
    (
        [7, 4, 3, 5, 2, 3, 1, 2, 4],
        [
            None,
            Branch(of=0, length=5),
            Branch(of=1, length=8),
            Branch(of=2, length=10),
            Branch(of=3, length=13),
            Branch(of=1, length=6),
            Branch(of=0, length=7),
            None,
            Branch(of=7, length=1),
        ],
    ),
    ([3, 2, 2, 2], [None, Branch(of=0, length=3), Branch(of=1, length=4), Branch(of=2, length=6)]),
]
TEMPERATURE = 0.7


def tree_tokens(index: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of a row, and the weights of their logprobs in the loss."""
    generator = torch.Generator().manual_seed(index)
    num_tokens = sum(TREES[index][0])
    return torch.randint(40, (num_tokens,), generator=generator), torch.randn(num_tokens, generator=generator)


def tree_loss(model: Any, index: int) -> Found:
    lengths, branches = TREES[index]
    tokens, weights = tree_tokens(index)
    mask = torch.cat([torch.arange(n) > (0 if b is None else -1) for n, b in zip(lengths, branches, strict=True)])
    logprobs, _ = policy_logprobs(
        model, tokens, torch.tensor(lengths), mask=mask, branches=branches, temperature=TEMPERATURE, entropy_grad=False
    )
    return (weights * logprobs).sum(), [logprobs]


def apart(index: int, model: Any) -> Found:
    """Compute every sequence of a row separately, with all tokens, by transformers' own forward pass."""
    lengths, branches = TREES[index]
    tokens, weights = tree_tokens(index)
    wholes: list[Tensor] = []
    columns = []
    for held, branch in zip(tokens.split(lengths), branches, strict=True):
        wholes.append(held if branch is None else torch.cat([wholes[branch.of][: branch.length], held]))
        logits = model(input_ids=wholes[-1][None]).logits[0, :-1] / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(-1, wholes[-1][1:, None])[:, 0]
        columns.append(torch.cat([torch.zeros(1), logprobs])[-len(held) :])
    row = torch.cat(columns)
    return (weights * row).sum(), [row]


def tree_gradients(rank: int, world_size: int, *, shared: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    engine = make_engine(model_of("policy", checkpointing=False), shared=shared, stage=0)
    mine = range(len(TREES))[rank // shared :: world_size // shared]
    columns = []
    for index in mine:
        loss, (logprobs,) = engine.forward(tree_loss, index)
        engine.backward(loss, last=index == mine[-1])
        columns.append(logprobs.detach())
    gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}
    engine.close()
    return columns, gradients


@pytest.mark.slow
@pytest.mark.parametrize("shared", [2, 4])
def test_deep_trees_shared_by_ranks_have_the_gradients_of_branches_apart(gang: Gang, shared: int) -> None:
    model = model_of("policy", checkpointing=False)
    expected = []
    for index in range(len(TREES)):
        loss, (logprobs,) = apart(index, model)
        loss.backward()
        expected.append(logprobs.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank, (columns, found) in enumerate(gang.run(tree_gradients, shared=shared)):
        for index, logprobs in zip(range(len(TREES))[rank // shared :: WORLD // shared], columns, strict=True):
            torch.testing.assert_close(logprobs, expected[index], rtol=1e-5, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name
