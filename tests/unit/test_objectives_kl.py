"""KL estimators and the adaptive coefficient, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.kl import (
    adaptive_kl_coef,
    kl_k1,
    kl_k1_straight_through,
    kl_k2,
    kl_k3,
    kl_k3_straight_through,
)

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REF = torch.tensor([-2.0, -1.5, -0.5], dtype=torch.float64)
LOG_RATIO = [1.0, -0.5, 0.0]  # logprobs - ref


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        (kl_k1, lambda d: d, lambda d: 1.0),
        (kl_k2, lambda d: d * d / 2, lambda d: d),
        (kl_k3, lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
        (kl_k1_straight_through, lambda d: d, lambda d: d),
        (kl_k3_straight_through, lambda d: math.exp(-d) - 1 + d, lambda d: d),
    ],
)
def test_value_and_gradient(
    estimator: Callable[[Tensor, Tensor], Tensor], value: Callable[[float], float], slope: Callable[[float], float]
) -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    kl = estimator(logprobs, REF)
    (gradient,) = torch.autograd.grad(kl.sum(), logprobs)
    torch.testing.assert_close(kl.tolist(), [value(d) for d in LOG_RATIO])
    torch.testing.assert_close(gradient.tolist(), [slope(d) for d in LOG_RATIO])


def test_k3_keeps_its_digits_near_zero() -> None:
    d = torch.tensor([1e-4])  # d^2 / 2 - d^3 / 6; in float32 exp(-d) - 1 + d would have no correct digit
    assert kl_k3(d, torch.zeros(1)).item() == pytest.approx(5e-9, rel=0.02)


def test_expectation_over_the_policy_is_the_kl() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):  # sum over the vocabulary of p * estimate
        torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), exact)


def test_which_gradient_is_that_of_which_kl() -> None:
    """The mean gradient over the policy's samples, by each logit, against autograd of the exact divergences."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def mean_gradient(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logp = logits.log_softmax(-1)
        return torch.autograd.grad((logp.detach().exp() * estimator(logp, q.log())).sum(), logits)[0]

    logp = logits.log_softmax(-1)
    (to_reference,) = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits, retain_graph=True)
    (from_reference,) = torch.autograd.grad((q * (q.log() - logp)).sum(), logits)
    for estimator in (kl_k2, kl_k1_straight_through, kl_k3_straight_through):
        torch.testing.assert_close(mean_gradient(estimator), to_reference)
    torch.testing.assert_close(mean_gradient(kl_k3), from_reference)
    torch.testing.assert_close(mean_gradient(kl_k1), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target: unchanged
        (6.6, 0.2 * (1 + 0.1 * 256 / 1000)),  # 10 % above
        (60.0, 0.2 * (1 + 0.2 * 256 / 1000)),  # far above: 20 % at most
        (0.0, 0.2 * (1 - 0.2 * 256 / 1000)),
    ],
)
def test_adaptive_coefficient(kl: float, expected: float) -> None:
    coef = adaptive_kl_coef(0.2, kl=kl, target=6.0, horizon=1000.0, num_sequences=256)
    assert coef == pytest.approx(expected)
