"""Importance weights and rejection masks, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.corrections import (
    Level,
    Statistic,
    accepted,
    kept,
    masked,
    on_policy_sequences,
    product_ratio,
    token_ratio,
    truncated,
)
from tests.fixtures.tensors import column

# Ratios 0.5, (hole), 3 in one sequence, their product 1.5; 4 and 1 in the other, product 4.
MASK, LENGTHS = torch.tensor([True, False, True, True, True]), torch.tensor([3, 2])
OLD, ROLLOUT = column(0.5, math.nan, 3.0, 4.0, 1.0).log(), column(1.0, 1.0, 1.0, 1.0, 1.0).log()


def test_ratios() -> None:
    torch.testing.assert_close(token_ratio(OLD, ROLLOUT, MASK), column(0.5, 0, 3, 4, 1))
    torch.testing.assert_close(product_ratio(OLD, ROLLOUT, MASK, LENGTHS), column(1.5, 0, 1.5, 4, 4))


def test_truncated() -> None:
    ratio = column(0.5, 9, 3, 4, 1)
    torch.testing.assert_close(truncated(ratio, MASK, max_ratio=2.0), column(0.5, 0, 2, 2, 1))
    torch.testing.assert_close(truncated(ratio, MASK, max_ratio=2.0, min_ratio=0.8), column(0.8, 0, 2, 2, 1))


def test_masked() -> None:
    ratio = column(0.5, 9, 3, 4, 1)
    torch.testing.assert_close(masked(ratio, MASK, min_ratio=0.8, max_ratio=3.5), column(0, 0, 3, 0, 1))


def test_an_infinite_ratio_is_truncated_or_dropped() -> None:
    mask = torch.tensor([True])
    ratio = token_ratio(column(0.0), column(-1e4), mask)
    assert truncated(ratio, mask, max_ratio=2.0) == 2.0
    assert masked(ratio, mask, max_ratio=2.0) == 0.0


def test_ratios_carry_no_gradient() -> None:
    old = OLD.clone().requires_grad_()
    assert not token_ratio(old, ROLLOUT, MASK).requires_grad
    assert not product_ratio(old, ROLLOUT, MASK, LENGTHS).requires_grad


def test_kept_includes_the_bounds() -> None:
    statistic, mask = column(0.1, 0.2, 0.3, 0.4, 0.25), torch.tensor([True, True, True, True, False])
    assert kept(statistic, mask, low=0.2, high=0.3).tolist() == [False, True, True, False, False]


# log r of the tokens: -0.693, (hole), 1.099 in one sequence; 1.386, 0 in the other.
@pytest.mark.parametrize(
    ("statistic", "level", "low", "high", "expected"),
    [
        ("ratio", "token", 0.6, 3.5, [0, 0, 1, 0, 1]),  # 0.5 and 4 are out
        ("ratio", "sequence_mean", 1.2, 1.3, [1, 0, 1, 0, 0]),  # geometric means sqrt(1.5) = 1.22 and 2
        ("ratio", "sequence_sum", 0.0, 2.0, [1, 0, 1, 0, 0]),  # products 1.5 and 4
        ("ratio", "sequence_max", 0.6, 4.5, [0, 0, 0, 1, 1]),  # 0.5 takes its sequence along
        ("k1", "token", -1.2, 0.5, [0, 0, 1, 0, 1]),  # 0.693 and -1.386 are out
        ("k1", "sequence_mean", -0.3, 0.3, [1, 0, 1, 0, 0]),  # -0.203 and -0.693
        ("k1", "sequence_sum", -1.0, 1.0, [1, 0, 1, 0, 0]),  # -0.405 and -1.386
        ("k1", "sequence_max", -1.2, math.inf, [1, 0, 1, 0, 0]),
        ("k2", "token", -math.inf, 0.5, [1, 0, 0, 0, 1]),  # 0.240, 0.603; 0.961, 0
        ("k2", "sequence_mean", -math.inf, 0.45, [1, 0, 1, 0, 0]),  # 0.422 and 0.480
        ("k2", "sequence_sum", -math.inf, 0.9, [1, 0, 1, 0, 0]),  # 0.844 and 0.961
        ("k2", "sequence_max", -math.inf, 0.7, [1, 0, 1, 0, 0]),  # 0.603 and 0.961
        ("k3", "token", -math.inf, 0.5, [1, 0, 0, 0, 1]),  # r - 1 - log r: 0.193, 0.901; 1.614, 0
        ("k3", "sequence_mean", -math.inf, 0.6, [1, 0, 1, 0, 0]),  # 0.547 and 0.807
        ("k3", "sequence_sum", -math.inf, 1.2, [1, 0, 1, 0, 0]),  # 1.095 and 1.614
        ("k3", "sequence_max", -math.inf, 1.0, [1, 0, 1, 0, 0]),  # 0.901 and 1.614
    ],
)
def test_accepted(statistic: Statistic, level: Level, low: float, high: float, expected: list[int]) -> None:
    found = accepted(OLD, ROLLOUT, MASK, LENGTHS, statistic=statistic, level=level, low=low, high=high)
    assert found.int().tolist() == expected


def test_off_policy_sequences_are_dropped_on_negative_advantages() -> None:
    # mean of rollout - logprobs: (0.1 + 0.5) / 2 = 0.3, then 0.1, then 0.9 with a positive advantage
    gap = column(0.1, 0.5, 0.1, 0.9)
    kept_tokens = on_policy_sequences(
        -gap,
        torch.zeros(4, dtype=torch.float64),
        column(-1, -1, -1, 1),
        torch.ones(4, dtype=torch.bool),
        torch.tensor([2, 1, 1]),
        max_kl=0.2,
    )
    assert kept_tokens.tolist() == [False, False, True, True]
