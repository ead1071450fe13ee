"""Losses with weighted log-probabilities, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.weighted_loss import cispo, dro, sapo, trusted_by_kl, trusted_by_tv, vespo_weights
from tests.fixtures.tensors import column

MASK = torch.tensor([True, True, True, False])
ADVANTAGES = column(1.0, -2.0, 1.0, 5.0)


def test_cispo_holds_the_weight_and_keeps_the_gradient() -> None:
    logprobs = column(-1.0, -1.0, -1.0, -1.0).requires_grad_()
    ratio = (logprobs - logprobs.detach()).exp() * column(0.5, 1.1, 2.0, 9.0)  # a gradient that must not be used
    terms = cispo(ratio, logprobs, ADVANTAGES, MASK, min_ratio=0.8, max_ratio=1.3)
    (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
    torch.testing.assert_close(terms.tolist(), [0.8, -2.2, 1.3, 0.0])  # -w * A * (-1)
    torch.testing.assert_close(gradient.tolist(), [-0.8, 2.2, -1.3, 0.0])  # -w * A


def test_sapo_gate() -> None:
    ratio = column(1.0, 1.5, 2.0, 9.0).requires_grad_()
    terms = sapo(ratio, ADVANTAGES, MASK, temperature_positive=2.0, temperature_negative=4.0)
    (gradient,) = torch.autograd.grad(terms.sum(), ratio)
    sigmoid = 1 / (1 + math.exp(-2.0))  # t * (r - 1) is 4 * 0.5 and 2 * 1
    # -(4/t) * sigmoid * A: (4/2) * 1/2 * 1, (4/4) * sigmoid * 2, (4/2) * sigmoid * 1
    torch.testing.assert_close(terms.tolist(), [-1.0, 2 * sigmoid, -2 * sigmoid, 0.0])
    assert gradient[0] == -1.0  # at ratio 1 that of REINFORCE, whatever the temperature


def test_binary_tv_trusts_small_moves_and_moves_back() -> None:
    old = column(0.5, 0.5, 0.5, 0.5).log()
    new = column(0.65, 0.65, 0.35, 0.65).log()
    trusted = trusted_by_tv(new, old, column(1, -1, -1, 1), MASK, max_decrease=0.2, max_increase=0.1)
    assert trusted.tolist() == [False, True, True, False]  # +0.15 too far up; up against A < 0 is free; -0.15 is near


def test_binary_kl_trusts_small_moves_and_moves_back() -> None:
    # KL of (0.5, 0.5) to (0.8, 0.2) or (0.2, 0.8): 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2) = 0.2231
    old, new = column(0.5, 0.5, 0.5, 0.5).log(), column(0.8, 0.8, 0.2, 0.2).log()
    advantages, everything = column(1, -1, -1, 1), torch.ones(4, dtype=torch.bool)
    tight = trusted_by_kl(new, old, advantages, everything, max_kl_decrease=0.22, max_kl_increase=0.22)
    assert tight.tolist() == [False, True, False, True]
    mixed = trusted_by_kl(new, old, advantages, everything, max_kl_decrease=0.23, max_kl_increase=0.22)
    assert mixed.tolist() == [False, True, True, True]


def test_vespo_weights() -> None:
    weights = vespo_weights(
        column(0.0, math.log(2.0), math.log(2.0)),
        column(1.0, 0.0, -1.0),
        power_positive=2.0,
        decay_positive=3.0,
        power_negative=1.0,
        decay_negative=0.5,
    )
    # w = 1: 1. w = 2: 2^2 e^(3 (1 - 2)), then 2^1 e^(0.5 (1 - 2))
    torch.testing.assert_close(weights.tolist(), [1.0, 4 * math.exp(-3.0), 2 * math.exp(-0.5)])
    extreme = vespo_weights(
        column(-1e4, 1e4),
        column(1.0, 1.0),
        power_positive=1.0,
        decay_positive=1.0,
        power_negative=1.0,
        decay_negative=1.0,
    )
    assert extreme.tolist() == pytest.approx([1e-8 * math.e, 0.0])


def test_dro() -> None:
    terms = dro(column(-1.0, -2.0), column(-1.5, -2.0), column(2.0, 9.0), torch.tensor([True, False]), beta=0.4)
    assert terms.tolist() == pytest.approx([2.0 + 0.2 * 0.25, 0.0])  # -(2 * -1) + 0.4 / 2 * 0.5^2
