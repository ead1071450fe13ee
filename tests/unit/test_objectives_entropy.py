"""Which tokens drive the entropy, by hand."""

from __future__ import annotations

import math

import torch

from rlhf.objectives.entropy import advantage_covariance, high_entropy_tokens, top_covariance_tokens

NOTHING = torch.zeros(2, dtype=torch.bool)


def test_high_entropy_tokens() -> None:
    entropy, mask = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 99.0]), torch.tensor([True] * 5 + [False])
    # the 0.75 quantile of 1..5 is 4
    assert high_entropy_tokens(entropy, mask, quantile=0.75).tolist() == [False, False, False, True, True, False]
    assert not high_entropy_tokens(torch.ones(2), NOTHING, quantile=0.5).any()


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
