"""f-divergences as transformations of log-ratios, by hand: u = 4 and u = 1/4."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.divergences import alpha_divergence_scores, forward_kl_scores, jensen_shannon_scores

LOG_RATIOS = torch.tensor([4.0, 0.25], dtype=torch.float64).log()


def test_forward_kl() -> None:
    torch.testing.assert_close(forward_kl_scores(LOG_RATIOS).tolist(), [1.0 - 0.25, 1.0 - 4.0])


def test_jensen_shannon() -> None:
    torch.testing.assert_close(jensen_shannon_scores(LOG_RATIOS).tolist(), [math.log(8 / 5), math.log(0.5 / 1.25)])


def test_alpha() -> None:
    half = alpha_divergence_scores(LOG_RATIOS, alpha=0.5)  # (u^(-1/2) - 1) / (-1/2)
    torch.testing.assert_close(half.tolist(), [(0.5 - 1.0) / -0.5, (2.0 - 1.0) / -0.5])
    torch.testing.assert_close(alpha_divergence_scores(LOG_RATIOS, alpha=2.0).tolist(), [3.0, -0.75])  # u - 1


def test_alpha_zero_is_the_forward_kl_and_one_the_log_ratio() -> None:
    torch.testing.assert_close(alpha_divergence_scores(LOG_RATIOS, alpha=0.0), forward_kl_scores(LOG_RATIOS))
    assert torch.equal(alpha_divergence_scores(LOG_RATIOS, alpha=1.0), LOG_RATIOS)
    near = alpha_divergence_scores(LOG_RATIOS, alpha=1.0 + 1e-5)
    torch.testing.assert_close(near, LOG_RATIOS, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("far", [-500.0, 500.0])
def test_far_log_ratios_stay_finite_in_float32(far: float) -> None:
    log_ratios = torch.tensor([far], requires_grad=True)
    for scores in (
        forward_kl_scores(log_ratios),
        jensen_shannon_scores(log_ratios),
        alpha_divergence_scores(log_ratios, alpha=0.5),
        alpha_divergence_scores(log_ratios, alpha=1.5),
    ):
        (gradient,) = torch.autograd.grad(scores.sum(), log_ratios)
        assert scores.isfinite().all()
        assert gradient.isfinite().all()
