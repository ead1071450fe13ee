"""Test losses of pairs. tests/parity compares the values of each loss with published libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.objectives.divergences import alpha_divergence_scores, forward_kl_scores, jensen_shannon_scores
from rlhf.objectives.preference_loss import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    dpo,
    exo_pair,
    hinge,
    ipo,
    log_odds,
    nca_pair,
    robust_dpo,
    simpo,
    sppo_hard,
)
from rlhf.objectives.sequence_logprobs import length_desensitized_total, on_policy_weights
from rlhf.objectives.unpaired_loss import apo_zero_unpaired, bco, kto, mismatched_kl
from tests.fixtures.tensors import column

LOG3 = math.log(3.0)


def test_dpo_and_its_gradient() -> None:
    """With differences of 2 log 3 and 0 and beta 1/2, sigmoid(beta d) is 3/4 and 1/2."""
    chosen, rejected = column(LOG3, LOG3).requires_grad_(), column(-LOG3, LOG3).requires_grad_()
    terms = dpo(chosen, rejected, beta=0.5)
    torch.testing.assert_close(terms.tolist(), [math.log(4 / 3), math.log(2.0)])
    gradients = torch.autograd.grad(terms.sum(), [chosen, rejected])
    torch.testing.assert_close(gradients[0].tolist(), [-0.5 * 0.25, -0.5 * 0.5])  # -beta * (1 - sigmoid)
    torch.testing.assert_close(gradients[1], -gradients[0])


def test_robust_dpo_of_flipped_labels_is_dpo_of_clean_ones_on_average() -> None:
    chosen, rejected = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    robust = partial(robust_dpo, beta=0.7, label_smoothing=0.2)
    mean = 0.8 * robust(chosen, rejected) + 0.2 * robust(rejected, chosen)
    torch.testing.assert_close(mean, dpo(chosen, rejected, beta=0.7))


def test_discopop_far_below_zero_is_logistic_and_finite() -> None:
    chosen = column(-1e4).requires_grad_()
    terms = discopop(chosen, column(0.0), beta=1.0)
    assert terms.tolist() == [1e4]
    assert torch.autograd.grad(terms.sum(), chosen)[0].tolist() == [-1.0]


@pytest.mark.parametrize(
    "loss",
    [
        dpo,
        partial(robust_dpo, label_smoothing=0.1),
        ipo,
        hinge,
        partial(exo_pair, label_smoothing=0.1),
        nca_pair,
        partial(bco_pair, delta=0.0),
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
        partial(simpo, gamma=0.5),
        aot,
        aot_unpaired,
    ],
)
def test_one_loss_a_pair_in_its_dtype(loss: Callable[..., Tensor]) -> None:
    chosen = torch.tensor([-1.0, -20.0, -300.0], requires_grad=True)
    terms = loss(chosen, torch.tensor([-300.0, -20.0, -1.0]), beta=0.1)
    assert (terms.shape, terms.dtype) == ((3,), torch.float32)
    assert terms.isfinite().all()
    assert torch.autograd.grad(terms.sum(), chosen)[0].isfinite().all()
    assert loss(torch.zeros(0), torch.zeros(0), beta=0.1).shape == (0,)


@pytest.mark.parametrize(
    "function",
    [
        log_odds,
        forward_kl_scores,
        jensen_shannon_scores,
        partial(alpha_divergence_scores, alpha=0.5),
        partial(alpha_divergence_scores, alpha=1.5),
        lambda x: kto(x, x > 0, beta=1.0, kl=0.0),
        lambda x: apo_zero_unpaired(x, x > 0, beta=1.0),
        lambda x: bco(x, x > 0, beta=1.0, delta=0.0),
    ],
)
def test_far_numbers_stay_finite_in_float32(function: Callable[[Tensor], Tensor]) -> None:
    far = torch.tensor([-500.0, -1e-9, 0.0, 1e-7, 500.0], requires_grad=True)
    values = function(far)
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), far)[0].isfinite().all()


def test_the_kl_estimate_is_held_at_zero() -> None:
    assert (mismatched_kl(3.0, 4), mismatched_kl(-3.0, 4)) == (0.75, 0.0)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda *columns: length_desensitized_total(*columns, torch.tensor([2, 2]), alpha=0.5),
        lambda values, mask, lengths: on_policy_weights(values, values, mask, lengths),
    ],
)
def test_a_response_without_a_token_is_refused(reduce: Callable[..., Tensor]) -> None:
    mask = torch.tensor([True, True, True, True, True, False, False])
    with pytest.raises(ValueError, match=r"sequences \[1\] have no token that counts"):
        reduce(torch.ones(7), mask, torch.tensor([5, 2]))
