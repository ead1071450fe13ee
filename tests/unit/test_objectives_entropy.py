"""Tokens are chosen by entropy and covariance, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.objectives.entropy import (
    adaptive_entropy_coef,
    advantage_covariance,
    drawn_covariance_tokens,
    high_entropy_tokens,
    top_covariance_tokens,
)


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
def test_high_entropy_tokens_are_those_at_or_above_torch_s_quantile(quantile: float) -> None:
    entropy = torch.rand(173, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(high_entropy_tokens(entropy, quantile=quantile), entropy >= entropy.quantile(quantile))
    assert len(high_entropy_tokens(torch.zeros(0), quantile=quantile)) == 0


def test_top_covariance_tokens() -> None:
    # means: A 1, logprob -2; products 2 * 1, -2 * -1
    covariance = advantage_covariance(torch.tensor([-1.0, -3.0]), torch.tensor([3.0, -1.0]))
    assert covariance.tolist() == [2.0, 2.0]
    chosen = top_covariance_tokens(torch.tensor([0.1, 0.5, 0.3, 0.2]), fraction=0.5)
    assert chosen.tolist() == [False, True, True, False]
    assert top_covariance_tokens(covariance, fraction=0.01).sum() == 1  # at least one
    assert len(top_covariance_tokens(torch.zeros(0), fraction=0.5)) == 0


@pytest.mark.parametrize(
    ("low", "fraction", "expected"),
    [(1.0, 0.5, [1, 3]), (1.0, 0.01, [3]), (4.0, 0.5, [])],  # two of five; the first in order, and at least one
)
def test_drawn_covariance_tokens(low: float, fraction: float, expected: list[int]) -> None:
    covariance, order = torch.tensor([0.5, 1.5, 9.0, 2.0, 1.0]), torch.tensor([0.0, 0.9, 0.1, 0.4, 0.3])
    drawn = drawn_covariance_tokens(covariance, order, low=low, high=5.0, fraction=fraction)
    assert drawn.nonzero().flatten().tolist() == expected
    assert len(drawn_covariance_tokens(torch.zeros(0), torch.zeros(0), low=low, high=5.0, fraction=fraction)) == 0


@pytest.mark.parametrize(
    ("coef", "entropy", "expected"),
    [(0.02, 0.1, 0.03), (0.02, 0.3, 0.01), (0.02, 0.2, 0.02), (0.045, 0.1, 0.05), (0.005, 0.3, 0.0)],
)
def test_adaptive_entropy_coef(coef: float, entropy: float, expected: float) -> None:
    found = adaptive_entropy_coef(coef, entropy=entropy, target=0.2, step=0.01, max_coef=0.05)
    assert found == pytest.approx(expected)
