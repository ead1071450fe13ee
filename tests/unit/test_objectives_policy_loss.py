"""Clipped losses and their ratios, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.objectives.policy_loss import (
    clipped_loss,
    clipped_ratios,
    dual_clipped_loss,
    reinforce,
)
from rlhf.objectives.sequence_ratios import geometric_mean_ratio, sequence_ratio, sequence_token_ratio
from tests.fixtures.tensors import column

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
RATIOS = [0.5, 1.1, 2.0, 5.0]


def all_true(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantage", "losses", "slopes"),
    [
        # A = 1: -min(r, clip(r)): 0.5, 1.1, then held at 1.3
        (1.0, [-0.5, -1.1, -1.3, -1.3], [-1.0, -1.0, 0.0, 0.0]),
        # A = -2: 2 max(r, clip(r)): held at 0.8, then 1.1, 2, 5 without bound
        (-2.0, [1.6, 2.2, 4.0, 10.0], [0.0, 2.0, 2.0, 2.0]),
    ],
)
def test_clipped_loss_and_its_gradient(advantage: float, losses: list[float], slopes: list[float]) -> None:
    ratio = column(*RATIOS).requires_grad_()
    terms = clipped_loss(ratio, column(*[advantage] * 4), all_true(4), **CLIP)
    (gradient,) = torch.autograd.grad(terms.sum(), ratio)
    torch.testing.assert_close(terms.tolist(), losses)
    torch.testing.assert_close(gradient.tolist(), slopes)


def test_the_dual_clip_bounds_the_loss_on_negative_advantages_only() -> None:
    ratio = column(*RATIOS).requires_grad_()
    negative = dual_clipped_loss(ratio, column(*[-2.0] * 4), all_true(4), **CLIP, max_ratio=3.0)
    (gradient,) = torch.autograd.grad(negative.sum(), ratio)
    torch.testing.assert_close(negative.tolist(), [1.6, 2.2, 4.0, 6.0])  # 2 * 3 in place of 2 * 5
    torch.testing.assert_close(gradient.tolist(), [0.0, 2.0, 2.0, 0.0])
    positive = column(*[1.0] * 4)
    same = clipped_loss(ratio, positive, all_true(4), **CLIP)
    assert torch.equal(dual_clipped_loss(ratio, positive, all_true(4), **CLIP, max_ratio=3.0), same)


def test_a_dual_clip_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_ratio > 1, got 1\.0"):
        dual_clipped_loss(column(1), column(1), all_true(1), **CLIP, max_ratio=1.0)


def test_clipped_ratios_are_those_without_a_gradient() -> None:
    low, high = clipped_ratios(column(*RATIOS, *RATIOS), column(*[1.0] * 4, *[-2.0] * 4), all_true(8), **CLIP)
    assert low.nonzero().flatten().tolist() == [4]  # r = 0.5 with A < 0
    assert high.nonzero().flatten().tolist() == [2, 3]  # r = 2 and 5 with A > 0
    masked = clipped_ratios(column(5.0), column(1.0), torch.tensor([False]), **CLIP)
    assert not masked[0] | masked[1]


def test_reinforce() -> None:
    terms = reinforce(column(-1.0, -2.0), column(3.0, -4.0), torch.tensor([True, False]))
    assert terms.tolist() == [3.0, 0.0]


LENGTHS = torch.tensor([3, 1])
SEQUENCE_MASK = torch.tensor([True, False, True, True])


def test_sequence_ratio_is_the_geometric_mean() -> None:
    # log-ratios 0.2 and 0.4 around a hole: mean 0.3; the other sequence -0.1
    logprobs = column(0.2, 9.0, 0.4, -0.1).requires_grad_()
    ratio = sequence_ratio(logprobs, column(0, 0, 0, 0), SEQUENCE_MASK, LENGTHS)
    torch.testing.assert_close(ratio.tolist(), [math.exp(0.3), 1.0, math.exp(0.3), math.exp(-0.1)])
    (gradient,) = torch.autograd.grad(ratio[0], logprobs)  # each sampled token has half of the exponent
    torch.testing.assert_close(gradient.tolist(), [math.exp(0.3) / 2, 0.0, math.exp(0.3) / 2, 0.0])


def test_sequence_token_ratio_has_each_tokens_own_gradient() -> None:
    logprobs, old = column(0.2, 9.0, 0.4, -0.1).requires_grad_(), column(0, 0, 0, 0)
    ratio = sequence_token_ratio(logprobs, old, SEQUENCE_MASK, LENGTHS)
    torch.testing.assert_close(ratio, sequence_ratio(logprobs, old, SEQUENCE_MASK, LENGTHS))
    (gradient,) = torch.autograd.grad(ratio[0], logprobs)
    torch.testing.assert_close(gradient.tolist(), [math.exp(0.3), 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("advantage", "mean_log_ratio"),
    [
        (1.0, (0.3 - 0.9) / 2),  # 0.7 held at 0.3, -0.9 free
        (-1.0, (0.7 - 0.2) / 2),  # -0.9 held at -0.2, 0.7 free
        (0.0, 0.0),
    ],
)
def test_geometric_mean_ratio_clips_each_token(advantage: float, mean_log_ratio: float) -> None:
    ratio = geometric_mean_ratio(
        column(0.7, -0.9), column(0, 0), column(advantage, advantage), all_true(2), torch.tensor([2]), **CLIP
    )
    torch.testing.assert_close(ratio.tolist(), [math.exp(mean_log_ratio)] * 2)
