"""The critic's loss, by hand."""

from __future__ import annotations

import math

import torch

from rlhf.objectives.value_loss import clipped_value_loss, clipped_values, value_loss

MASK = torch.tensor([True, True, True, False])
VALUES, OLD = torch.tensor([1.0, 3.0, 1.0, math.nan]), torch.tensor([1.0, 1.0, 1.0, math.nan])
RETURNS = torch.tensor([2.0, 4.0, -1.0, math.nan])


def test_value_loss() -> None:
    assert value_loss(VALUES, RETURNS, MASK).tolist() == [0.5, 0.5, 2.0, 0.0]  # errors 1, 1, 2, halved squares


def test_a_value_that_has_moved_too_far_towards_its_return_is_held() -> None:
    # value 3 held at 1.5: error 2.5 instead of 1, without a gradient
    values = VALUES.clone().requires_grad_()
    terms = clipped_value_loss(values, OLD, RETURNS, MASK, clip=0.5)
    (gradient,) = torch.autograd.grad(terms.sum(), values)
    assert terms.tolist() == [0.5, 3.125, 2.0, 0.0]
    assert gradient.tolist() == [-1.0, 0.0, 2.0, 0.0]
    assert clipped_values(values, OLD, RETURNS, MASK, clip=0.5).tolist() == [False, True, False, False]


def test_a_value_that_has_moved_away_is_not_held() -> None:
    value, old, returns = (torch.tensor([v]) for v in (3.0, 1.0, 0.0))
    mask = torch.ones(1, dtype=torch.bool)
    assert clipped_value_loss(value, old, returns, mask, clip=0.5).tolist() == [4.5]  # 3^2 / 2, not 1.5^2 / 2
    assert not clipped_values(value, old, returns, mask, clip=0.5)
