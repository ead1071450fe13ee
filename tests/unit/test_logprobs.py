"""rlhf.objectives.logprobs against plain log_softmax, forward and backward."""

from __future__ import annotations

from typing import Any

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
TARGETS = torch.arange(ROWS) * 5 % VOCABULARY
every_head = pytest.mark.parametrize(
    "head",
    [
        {"temperature": 1.0, "softcap": None, "logit_scale": 1.0},
        {"temperature": 0.7, "softcap": None, "logit_scale": 0.5},
        {"temperature": 1.3, "softcap": 2.0, "logit_scale": 0.25},
        {"temperature": torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64), "softcap": 2.0, "logit_scale": 0.5},
        {"temperature": torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64), "softcap": None, "logit_scale": 0.5},
    ],
    ids=["plain", "scaled", "capped", "by row, capped", "by row"],
)
# 13 rows: several products of 4 chunks, a ragged last one, one
every_size = pytest.mark.parametrize("chunk_size", [1, 2, 64])


def inputs() -> list[Tensor]:
    """Return hidden states, weight and bias."""
    torch.manual_seed(0)
    shapes = ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def plain_logits(x: list[Tensor], head: dict[str, Any]) -> Tensor:
    logits = (x[0] @ x[1].t() + x[2]) * head["logit_scale"]
    if head["softcap"] is not None:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    temperature = head["temperature"]
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def same_gradients(found: Tensor, expected: Tensor, x: list[Tensor]) -> None:
    close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@every_head
@every_size
@pytest.mark.parametrize("use", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["logprobs", "entropy", "both"])
def test_chunked_equals_plain(head: dict[str, Any], chunk_size: int, use: tuple[float, float]) -> None:
    x = inputs()
    weights = torch.randn(2, ROWS, dtype=torch.float64)
    logits = plain_logits(x, head)
    expected = logprobs_from_logits(logits, TARGETS), entropy_from_logits(logits)
    found = chunked_logprobs(*x[:2], TARGETS, bias=x[2], entropy_grad=True, chunk_size=chunk_size, **head)
    close(found, expected)
    totals = [[(row * w).sum() for row, w in zip(rows, weights, strict=True)] for rows in (found, expected)]
    used = [sum(total for total, counts in zip(parts, use, strict=True) if counts) for parts in totals]
    same_gradients(*used, x)  # type: ignore[arg-type]


@every_head
@every_size
def test_chunked_collisions_equal_plain_and_have_no_gradient(head: dict[str, Any], chunk_size: int) -> None:
    x = inputs()
    logits = plain_logits(x, head)
    expected = logprobs_from_logits(logits, TARGETS)
    settings = {"bias": x[2], "chunk_size": chunk_size, **head}
    logprobs, collisions = chunked_logprobs_and_collisions(*x[:2], TARGETS, **settings)
    close([logprobs, collisions], [expected, collision_logprob_from_logits(logits).detach()])
    assert not collisions.requires_grad
    same_gradients(logprobs.sum(), expected.sum(), x)
    close(chunked_logprobs_only(*x[:2], TARGETS, **settings), expected)


@every_head
@every_size
def test_weighted_sum_equals_plain(head: dict[str, Any], chunk_size: int) -> None:
    x = inputs()
    weights = torch.randn(ROWS, dtype=torch.float64)
    expected = logprobs_from_logits(plain_logits(x, head), TARGETS)
    settings = {"bias": x[2], "chunk_size": chunk_size, **head}
    total, logprobs, is_top1 = weighted_logprob_sum(*x[:2], TARGETS, weights, **settings)
    close([total, logprobs], [(expected * weights).sum(), expected.detach()])
    assert torch.equal(is_top1, is_top1_from_logits(plain_logits(x, head), TARGETS))
    # the forward pass computes the gradient; a factor outside must still scale the gradient
    same_gradients(3.0 * total, 3.0 * (expected * weights).sum(), x)


def test_weights_by_probability_make_dynamic_fine_tuning() -> None:
    x = inputs()
    mask = torch.ones(ROWS, dtype=torch.bool)
    expected = dynamic_fine_tuning(logprobs_from_logits(x[0] @ x[1].t() + x[2], TARGETS), mask).sum()
    weights = -torch.ones(ROWS, dtype=torch.float64)
    total = weighted_logprob_sum(*x[:2], TARGETS, weights, by_probability=True, bias=x[2])[0]
    close(total, expected)
    same_gradients(total, expected, x)


def test_what_needs_no_gradient_has_none() -> None:
    hidden, weight, _ = inputs()
    assert not chunked_logprobs(hidden, weight, TARGETS)[1].requires_grad  # entropy: no gradient by default
    chunked_logprobs_only(hidden, weight.detach(), TARGETS).sum().backward()
    expected = logprobs_from_logits(hidden @ weight.detach().t(), TARGETS).sum()
    close(hidden.grad, torch.autograd.grad(expected, hidden)[0])


def test_bfloat16_sums_the_weight_gradient_in_float32() -> None:
    """512 rows in blocks of 4: rounding the sum to bfloat16 after each block would lose over 1 % of the gradient."""
    hidden, weight = torch.ones(512, 4), torch.zeros(2, 4).bfloat16().requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64)
    chunked_logprobs_only(hidden.bfloat16(), weight, targets, chunk_size=1).sum().backward()
    # p = (1/2, 1/2): each row adds +1/2 and -1/2, and 512 / 2 = 256 is exact in bfloat16
    assert weight.grad.tolist() == [[256.0] * 4, [-256.0] * 4]


def test_no_rows() -> None:
    hidden, weight, _ = inputs()
    logprobs, entropy = chunked_logprobs(hidden[:0], weight, TARGETS[:0])
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("temperature", [0.0, torch.zeros(ROWS)])
def test_greedy_temperature_is_refused(temperature: float | Tensor) -> None:
    hidden, weight, _ = inputs()
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        chunked_logprobs(hidden, weight, TARGETS, temperature=temperature)
