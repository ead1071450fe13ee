"""Sums of a response, by hand: responses of 3 and 2 counted tokens, with a hole in the first."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.sequence_logprobs import (
    length_desensitized_total,
    on_policy_weights,
)

VALUES = torch.tensor([9.0, 1.0, math.nan, 2.0, 4.0, 10.0, 20.0], dtype=torch.float64)
MASK = torch.tensor([False, True, False, True, True, True, True])
LENGTHS = torch.tensor([5, 2])
SHARED = torch.tensor([2, 2])


def test_length_desensitized_total_weighs_the_surplus() -> None:
    halves = length_desensitized_total(VALUES, MASK, LENGTHS, SHARED, alpha=0.5)
    assert halves.tolist() == [1.0 + 2.0 + 0.5 * 4.0, 30.0]
    assert length_desensitized_total(VALUES, MASK, LENGTHS, SHARED, alpha=0.0).tolist() == [3.0, 30.0]
    full = length_desensitized_total(VALUES, MASK, LENGTHS, SHARED, alpha=1.0)
    assert full.tolist() == [7.0, 30.0]


def test_the_gradient_of_the_surplus_is_alpha() -> None:
    values = VALUES.clone().requires_grad_()
    total = length_desensitized_total(values, MASK, LENGTHS, SHARED, alpha=0.25).sum()
    assert torch.autograd.grad(total, values)[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        length_desensitized_total(VALUES, MASK, LENGTHS, SHARED, alpha=alpha)


def test_on_policy_weights() -> None:
    # probabilities 1/2, 1/8, 1/2 where two draws agree with 1/4, 1/4, 1/2: ratios 2, 1/2, 1; then 1/4 of 1/2, twice
    logprobs = torch.tensor([9.0, 0.5, 9.0, 0.125, 0.5, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    collisions = torch.tensor([9.0, 0.25, 9.0, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64).log()
    weights = on_policy_weights(logprobs, collisions, MASK, LENGTHS)
    torch.testing.assert_close(weights.tolist(), [1.0, 0.5])
    assert not weights.requires_grad


@pytest.mark.parametrize(
    "reduce",
    [
        lambda *columns: length_desensitized_total(*columns, SHARED, alpha=0.5),
        lambda values, mask, lengths: on_policy_weights(values, values, mask, lengths),
    ],
)
def test_a_response_without_a_token_is_refused(reduce: Callable[..., Tensor]) -> None:
    mask = torch.tensor([True, True, True, True, True, False, False])
    with pytest.raises(ValueError, match=r"sequences \[1\] have no token that counts"):
        reduce(VALUES, mask, LENGTHS)
