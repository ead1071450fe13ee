"""KL estimators and the adaptive coefficient, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.kl import adaptive_kl_coef, kl_k1, kl_k2, kl_k3

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REF = torch.tensor([-2.0, -1.5, -0.5], dtype=torch.float64)
LOG_RATIO = [1.0, -0.5, 0.0]  # logprobs - ref


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        (kl_k1, lambda d: d, lambda d: 1.0),
        (kl_k2, lambda d: d * d / 2, lambda d: d),
        (kl_k3, lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
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
