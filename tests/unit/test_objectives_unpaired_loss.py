"""Losses of single labelled responses, by hand: sigmoid(log 3) is 3/4."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.preference_loss import apo_zero, bco_pair
from rlhf.objectives.unpaired_loss import (
    apo_zero_unpaired,
    bco,
    kto,
    label_weights,
    mismatched_kl,
)

LOG3 = math.log(3.0)
LOG_RATIOS = torch.tensor([2.0 * LOG3, 2.0 * LOG3, 0.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, False])


def test_kto_and_its_gradient() -> None:
    log_ratios = LOG_RATIOS.clone().requires_grad_()
    terms = kto(log_ratios, LABELS, beta=1.0, kl=LOG3)
    torch.testing.assert_close(terms.tolist(), [0.25, 0.75, 0.25])  # log-ratios are log 3, log 3, -log 3 above the KL
    (gradient,) = torch.autograd.grad(terms.sum(), log_ratios)
    torch.testing.assert_close(gradient.tolist(), [-3.0 / 16.0, 3.0 / 16.0, 3.0 / 16.0])


def test_the_kl_estimate_is_held_at_zero() -> None:
    assert mismatched_kl(3.0, 4) == 0.75
    assert mismatched_kl(-3.0, 4) == 0.0


def test_apo_zero_is_the_sum_of_its_halves() -> None:
    both = apo_zero_unpaired(LOG_RATIOS, LABELS, beta=0.5)
    torch.testing.assert_close(both.tolist(), [0.25, 0.75, 0.5])
    pair = apo_zero(LOG_RATIOS[:1], LOG_RATIOS[1:2], beta=0.5)
    torch.testing.assert_close(pair, both[:1] + both[1:2])


def test_bco_is_a_classifier() -> None:
    terms = bco(LOG_RATIOS, LABELS, beta=1.0, delta=LOG3)
    torch.testing.assert_close(terms.tolist(), [-math.log(0.75), -math.log(0.25), -math.log(0.75)])
    pair = bco_pair(LOG_RATIOS[:1], LOG_RATIOS[2:], beta=1.0, delta=LOG3)
    torch.testing.assert_close(pair, terms[:1] + terms[2:])


def test_label_weights() -> None:
    assert label_weights(LABELS, desirable=1.5, undesirable=0.5).tolist() == [1.5, 0.5, 0.5]


def test_far_log_ratios_stay_finite() -> None:
    log_ratios = torch.tensor([-1e4, 1e4, 1e4], requires_grad=True)
    for terms in (
        kto(log_ratios, LABELS, beta=1.0, kl=0.0),
        apo_zero_unpaired(log_ratios, LABELS, beta=1.0),
        bco(log_ratios, LABELS, beta=1.0, delta=0.0),
    ):
        assert terms.isfinite().all()
        assert torch.autograd.grad(terms.sum(), log_ratios)[0].isfinite().all()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="kto needs beta > 0"):
        kto(LOG_RATIOS, LABELS, beta=0.0, kl=0.0)
    with pytest.raises(ValueError, match=r"kl >= 0, got -0\.1"):
        kto(LOG_RATIOS, LABELS, beta=1.0, kl=-0.1)
    with pytest.raises(ValueError, match="apo_zero_unpaired needs beta > 0"):
        apo_zero_unpaired(LOG_RATIOS, LABELS, beta=-1.0)
    with pytest.raises(ValueError, match="bco needs beta > 0"):
        bco(LOG_RATIOS, LABELS, beta=0.0, delta=0.0)
    with pytest.raises(ValueError, match="at least 1 sequence"):
        mismatched_kl(0.0, 0)
