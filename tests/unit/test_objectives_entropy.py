"""Tokens are chosen by entropy and covariance, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.entropy import (
    adaptive_entropy_coef,
    advantage_covariance,
    drawn_covariance_tokens,
    high_entropy_tokens,
    top_covariance_tokens,
)

NOTHING = torch.zeros(2, dtype=torch.bool)


def test_high_entropy_tokens() -> None:
    entropy, mask = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 99.0]), torch.tensor([True] * 5 + [False])
    # the 0.75 quantile of 1..5 is 4
    assert high_entropy_tokens(entropy, mask, quantile=0.75).tolist() == [False, False, False, True, True, False]
    assert not high_entropy_tokens(torch.ones(2), NOTHING, quantile=0.5).any()


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
def test_high_entropy_tokens_are_those_at_or_above_torch_s_quantile(quantile: float) -> None:
    entropy = torch.rand(173, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = entropy >= entropy.quantile(quantile)
    assert torch.equal(high_entropy_tokens(entropy, torch.ones(173, dtype=torch.bool), quantile=quantile), expected)


def test_advantage_covariance() -> None:
    # means over the mask: A 1, logprob -2
    covariance = advantage_covariance(
        torch.tensor([-1.0, -3.0, math.nan]), torch.tensor([3.0, -1.0, math.nan]), torch.tensor([True, True, False])
    )
    assert covariance.tolist() == [2.0, 2.0, 0.0]  # 2 * 1, -2 * -1


def test_top_covariance_tokens() -> None:
    covariance, mask = torch.tensor([0.1, 0.5, 9.0, 0.3, 0.2]), torch.tensor([True, True, False, True, True])
    chosen = top_covariance_tokens(covariance, mask, fraction=0.5)  # 2 of the 4 that count
    assert chosen.tolist() == [False, True, False, True, False]
    assert top_covariance_tokens(covariance, mask, fraction=0.01).sum() == 1  # at least one
    assert not top_covariance_tokens(torch.ones(2), NOTHING, fraction=0.5).any()


def test_drawn_covariance_tokens() -> None:
    covariance = torch.tensor([0.5, 1.5, 9.0, 2.0, 3.0, 1.0])
    mask, order = torch.tensor([True] * 4 + [False, True]), torch.tensor([0.0, 0.9, 0.1, 0.4, 0.2, 0.3])
    bounds = {"low": 1.0, "high": 5.0}  # tokens 1 and 3: above 1, below 5, and counted
    both = drawn_covariance_tokens(covariance, mask, order, **bounds, fraction=0.5)  # 2 of 5
    assert both.nonzero().flatten().tolist() == [1, 3]
    one = drawn_covariance_tokens(covariance, mask, order, **bounds, fraction=0.01)
    assert one.nonzero().flatten().tolist() == [3]  # the first in order, and at least one
    assert not drawn_covariance_tokens(covariance, mask, order, low=10.0, high=20.0, fraction=0.5).any()
    assert not drawn_covariance_tokens(torch.ones(2), NOTHING, torch.ones(2), low=0.0, high=2.0, fraction=1.0).any()


@pytest.mark.parametrize(
    ("coef", "entropy", "expected"),
    [(0.02, 0.1, 0.03), (0.02, 0.3, 0.01), (0.02, 0.2, 0.02), (0.045, 0.1, 0.05), (0.005, 0.3, 0.0)],
)
def test_adaptive_entropy_coef(coef: float, entropy: float, expected: float) -> None:
    found = adaptive_entropy_coef(coef, entropy=entropy, target=0.2, step=0.01, max_coef=0.05)
    assert found == pytest.approx(expected)
