"""Importance weights and rejection masks, by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.objectives.corrections import (
    kept,
    on_policy_sequences,
    sequence_masked,
    sequence_ratio,
    sequence_truncated,
    token_masked,
    token_ratio,
    token_truncated,
)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Ratios 0.5, (hole), 3 in one sequence, their product 1.5; 4 and 1 in the other, product 4.
MASK, LENGTHS = torch.tensor([True, False, True, True, True]), torch.tensor([3, 2])
OLD, ROLLOUT = column(0.5, math.nan, 3.0, 4.0, 1.0).log(), column(1.0, 1.0, 1.0, 1.0, 1.0).log()


def test_ratios() -> None:
    torch.testing.assert_close(token_ratio(OLD, ROLLOUT, MASK), column(0.5, 0, 3, 4, 1))
    torch.testing.assert_close(sequence_ratio(OLD, ROLLOUT, MASK, LENGTHS), column(1.5, 4))


def test_truncated() -> None:
    torch.testing.assert_close(token_truncated(OLD, ROLLOUT, MASK, max_ratio=2.0), column(0.5, 0, 2, 2, 1))
    torch.testing.assert_close(
        token_truncated(OLD, ROLLOUT, MASK, max_ratio=2.0, min_ratio=0.8), column(0.8, 0, 2, 2, 1)
    )
    torch.testing.assert_close(
        sequence_truncated(OLD, ROLLOUT, MASK, LENGTHS, max_ratio=2.0), column(1.5, 0, 1.5, 2, 2)
    )


def test_masked() -> None:
    torch.testing.assert_close(token_masked(OLD, ROLLOUT, MASK, min_ratio=0.8, max_ratio=3.5), column(0, 0, 3, 0, 1))
    torch.testing.assert_close(
        sequence_masked(OLD, ROLLOUT, MASK, LENGTHS, min_ratio=0.8, max_ratio=2.0), column(1.5, 0, 1.5, 0, 0)
    )


def test_an_infinite_ratio_is_truncated_or_dropped() -> None:
    old, rollout, mask = column(0.0), column(-1e4), torch.tensor([True])
    assert token_truncated(old, rollout, mask, max_ratio=2.0) == 2.0
    assert token_masked(old, rollout, mask, max_ratio=2.0) == 0.0


def test_weights_carry_no_gradient() -> None:
    old = OLD.clone().requires_grad_()
    assert not token_truncated(old, ROLLOUT, MASK, max_ratio=2.0).requires_grad
    assert not sequence_truncated(old, ROLLOUT, MASK, LENGTHS, max_ratio=2.0).requires_grad


def test_kept_includes_the_bounds() -> None:
    statistic, mask = column(0.1, 0.2, 0.3, 0.4, 0.25), torch.tensor([True, True, True, True, False])
    assert kept(statistic, mask, low=0.2, high=0.3).tolist() == [False, True, True, False, False]


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
