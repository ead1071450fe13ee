"""KL estimators, by hand. tests/parity compares the adaptive coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.kl import ESTIMATORS, Estimator, kl_k3


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
        ("k1_straight_through", lambda d: d, lambda d: d),
        ("k3_straight_through", lambda d: math.exp(-d) - 1 + d, lambda d: d),
    ],
)
def test_value_and_gradient(name: str, value: Callable[[float], float], slope: Callable[[float], float]) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    kl = ESTIMATORS[name](logprobs, torch.tensor([-2.0, -1.5, -0.5], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(kl.sum(), logprobs)
    log_ratios = [1.0, -0.5, 0.0]  # logprobs - ref
    torch.testing.assert_close(kl.tolist(), [value(d) for d in log_ratios])
    torch.testing.assert_close(gradient.tolist(), [slope(d) for d in log_ratios])


def test_k3_keeps_its_digits_near_zero() -> None:
    d = torch.tensor([1e-4])  # d^2 / 2 - d^3 / 6; in float32 exp(-d) - 1 + d would have no correct digit
    assert kl_k3(d, torch.zeros(1)).item() == pytest.approx(5e-9, rel=0.02)


def test_which_gradient_is_that_of_which_kl() -> None:
    """The mean gradient over the policy's samples, by each logit, against autograd of the exact divergences."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def mean_gradient(estimator: Estimator) -> Tensor:
        logp = logits.log_softmax(-1)
        return torch.autograd.grad((logp.detach().exp() * estimator(logp, q.log())).sum(), logits)[0]

    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - q.log())).sum()
    (to_reference,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (from_reference,) = torch.autograd.grad((q * (q.log() - logp)).sum(), logits)
    found = {name: mean_gradient(estimator) for name, estimator in ESTIMATORS.items()}
    for name in ("k2", "k1_straight_through", "k3_straight_through"):
        torch.testing.assert_close(found[name], to_reference)
    torch.testing.assert_close(found["k3"], from_reference)
    torch.testing.assert_close(found["k1"], torch.zeros_like(q))
    for name in ("k1", "k3"):  # unbiased
        torch.testing.assert_close((logp.exp() * ESTIMATORS[name](logp, q.log())).sum(), exact)
