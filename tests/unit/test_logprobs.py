"""rlhf.objectives.logprobs against plain log_softmax, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.objectives.logprobs import (
    chunked_logprobs,
    chunked_logprobs_and_collisions,
    chunked_logprobs_only,
    weighted_logprob_sum,
)
from tests.plain_logits import (
    collision_logprob_from_logits,
    dynamic_fine_tuning,
    entropy_from_logits,
    is_top1_from_logits,
    logprobs_from_logits,
)

ROWS, HIDDEN, VOCABULARY = 13, 6, 11
HEADS = [
    {"temperature": 1.0, "softcap": None, "logit_scale": 1.0},
    {"temperature": 0.7, "softcap": None, "logit_scale": 0.5},
    {"temperature": 1.3, "softcap": 2.0, "logit_scale": 0.25},
]


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(ROWS, HIDDEN, dtype=dtype).requires_grad_(),
        "weight": torch.randn(VOCABULARY, HIDDEN, dtype=dtype).requires_grad_(),
        "bias": torch.randn(VOCABULARY, dtype=dtype).requires_grad_(),
    }


TARGETS = torch.arange(ROWS) * 5 % VOCABULARY


def plain_logits(x: dict[str, Tensor], head: dict[str, float | None]) -> Tensor:
    logits = (x["hidden"] @ x["weight"].t() + x["bias"]) * head["logit_scale"]
    if head["softcap"] is not None:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    return logits / head["temperature"]


def gradients(total: Tensor, x: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(x.values())))


def test_two_tokens_by_hand() -> None:
    # logits (0, ln 3): p = (1/4, 3/4); entropy = ln 4 / 4 + (3/4) ln(4/3) = 0.5623351446; sum p^2 = 10/16
    logits = torch.tensor([[0.0, math.log(3.0)]])
    logprobs = logprobs_from_logits(logits, torch.tensor([1]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75)]))
    torch.testing.assert_close(entropy_from_logits(logits), torch.tensor([0.5623351446]))
    torch.testing.assert_close(collision_logprob_from_logits(logits), torch.tensor([math.log(0.625)]))
    assert is_top1_from_logits(logits, torch.tensor([1])).tolist() == [True]
    assert is_top1_from_logits(torch.zeros(1, 2), torch.tensor([1])).tolist() == [False]  # the first of equals


def test_a_forbidden_token_adds_no_entropy() -> None:
    torch.testing.assert_close(entropy_from_logits(torch.tensor([0.0, 0.0, -torch.inf])), torch.tensor(math.log(2.0)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 2, 64])  # 13 rows: several products of 4 chunks, a ragged last one, one
def test_chunked_equals_plain(head: dict[str, float | None], chunk_size: int) -> None:
    x = inputs()
    weights, entropy_weights = torch.randn(2, ROWS, dtype=torch.float64)
    logits = plain_logits(x, head)
    expected = logprobs_from_logits(logits, TARGETS), entropy_from_logits(logits)
    got = chunked_logprobs(
        x["hidden"], x["weight"], TARGETS, bias=x["bias"], entropy_grad=True, chunk_size=chunk_size, **head
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    total = (expected[0] * weights).sum() + (expected[1] * entropy_weights).sum()
    got_total = (got[0] * weights).sum() + (got[1] * entropy_weights).sum()
    torch.testing.assert_close(gradients(got_total, x), gradients(total, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [2, 64])
def test_rows_may_have_a_temperature_each(softcap: float | None, chunk_size: int) -> None:
    x = inputs()
    temperatures = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    weights, entropy_weights = torch.randn(2, ROWS, dtype=torch.float64)
    head = {"softcap": softcap, "logit_scale": 0.5}
    logits = plain_logits(x, head | {"temperature": 1.0}) / temperatures[:, None]
    expected = logprobs_from_logits(logits, TARGETS), entropy_from_logits(logits)
    rows = (x["hidden"], x["weight"], TARGETS)
    settings = {"bias": x["bias"], "temperature": temperatures, "chunk_size": chunk_size, **head}
    got = chunked_logprobs(*rows, entropy_grad=True, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    total = (expected[0] * weights).sum() + (expected[1] * entropy_weights).sum()
    got_total = (got[0] * weights).sum() + (got[1] * entropy_weights).sum()
    torch.testing.assert_close(gradients(got_total, x), gradients(total, x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chunked_logprobs_only(*rows, **settings), expected[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        chunked_logprobs_only(*rows, **settings | {"temperature": temperatures * 0.0})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("use", ["logprobs", "entropy"])
def test_each_output_alone_has_its_gradient(head: dict[str, float | None], use: str) -> None:
    x = inputs()
    logits = plain_logits(x, head)
    got = chunked_logprobs(x["hidden"], x["weight"], TARGETS, bias=x["bias"], entropy_grad=True, chunk_size=4, **head)
    total = logprobs_from_logits(logits, TARGETS) if use == "logprobs" else entropy_from_logits(logits)
    got_total = got[0] if use == "logprobs" else got[1]
    torch.testing.assert_close(gradients(got_total.sum(), x), gradients(total.sum(), x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_chunked_collisions_equal_plain_and_have_no_gradient(head: dict[str, float | None], chunk_size: int) -> None:
    x = inputs()
    weights = torch.randn(ROWS, dtype=torch.float64)
    logits = plain_logits(x, head)
    expected = logprobs_from_logits(logits, TARGETS)
    logprobs, collisions = chunked_logprobs_and_collisions(
        x["hidden"], x["weight"], TARGETS, bias=x["bias"], chunk_size=chunk_size, **head
    )
    torch.testing.assert_close(collisions, (logits.softmax(-1) ** 2).sum(-1).log().detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(collisions, collision_logprob_from_logits(logits).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    assert not collisions.requires_grad
    got = gradients((logprobs * weights).sum(), x)
    torch.testing.assert_close(got, gradients((expected * weights).sum(), x), rtol=1e-10, atol=1e-12)


def test_entropy_has_no_gradient_unless_asked() -> None:
    x = inputs()
    logprobs, entropy = chunked_logprobs(x["hidden"], x["weight"], TARGETS)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_weighted_sum_equals_plain(head: dict[str, float | None], chunk_size: int) -> None:
    x = inputs()
    weights = torch.randn(ROWS, dtype=torch.float64)
    expected = logprobs_from_logits(plain_logits(x, head), TARGETS)
    total, logprobs, is_top1 = weighted_logprob_sum(
        x["hidden"], x["weight"], TARGETS, weights, bias=x["bias"], chunk_size=chunk_size, **head
    )
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(is_top1, is_top1_from_logits(plain_logits(x, head), TARGETS))
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-12, atol=1e-12)
    got = gradients(3.0 * total, x)  # an outer factor reaches the gradient that was made in the forward pass
    torch.testing.assert_close(got, gradients(3.0 * (expected * weights).sum(), x), rtol=1e-10, atol=1e-12)


def test_weights_by_probability_make_dynamic_fine_tuning() -> None:
    x = inputs()
    mask = torch.ones(ROWS, dtype=torch.bool)
    expected = dynamic_fine_tuning(logprobs_from_logits(x["hidden"] @ x["weight"].t() + x["bias"], TARGETS), mask).sum()
    weights = -torch.ones(ROWS, dtype=torch.float64)
    total = weighted_logprob_sum(x["hidden"], x["weight"], TARGETS, weights, by_probability=True, bias=x["bias"])[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(total, x), gradients(expected, x), rtol=1e-10, atol=1e-12)


def test_top1_of_the_likeliest_and_the_least_likely() -> None:
    x = inputs()
    logits = x["hidden"] @ x["weight"].t()
    weights = torch.ones(ROWS, dtype=torch.float64)
    assert weighted_logprob_sum(x["hidden"], x["weight"], logits.argmax(-1), weights, chunk_size=4)[2].all()
    assert not weighted_logprob_sum(x["hidden"], x["weight"], logits.argmin(-1), weights)[2].any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    x = inputs()
    chunked_logprobs_only(x["hidden"], x["weight"].detach(), TARGETS).sum().backward()
    expected = torch.autograd.grad(
        logprobs_from_logits(x["hidden"] @ x["weight"].detach().t(), TARGETS).sum(), x["hidden"]
    )[0]
    torch.testing.assert_close(x["hidden"].grad, expected)


def test_bfloat16_sums_the_weight_gradient_in_float32() -> None:
    """512 rows in blocks of 4: rounding the sum to bfloat16 after each block would lose over 1 % of the gradient."""
    torch.manual_seed(0)
    hidden, weight = torch.ones(512, 4), torch.zeros(2, 4)
    targets = torch.zeros(512, dtype=torch.int64)
    bf16 = weight.bfloat16().requires_grad_()
    chunked_logprobs_only(hidden.bfloat16(), bf16, targets, chunk_size=1).sum().backward()
    # p = (1/2, 1/2): each row adds +1/2 and -1/2, and 512 / 2 = 256 is exact in bfloat16
    assert bf16.grad.tolist() == [[256.0] * 4, [-256.0] * 4]


def test_no_rows() -> None:
    x = inputs()
    logprobs, entropy = chunked_logprobs(x["hidden"][:0], x["weight"], TARGETS[:0])
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert not x["weight"].grad.any()


def test_greedy_temperature_is_refused() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        chunked_logprobs(x["hidden"], x["weight"], TARGETS, temperature=0.0)
