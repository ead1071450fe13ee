"""Losses of pairs, by hand. With margins of 2 log 3 and beta 1/2, sigmoid(beta d) is 3/4."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.objectives.divergences import alphapo_scores
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
    odds_ratio,
    robust_dpo,
    simpo,
    sppo_hard,
)
from tests.fixtures.tensors import column

LOG3, LOG4, LOG43 = math.log(3.0), math.log(4.0), math.log(4.0 / 3.0)  # -log 1/3, -log 1/4, -log 3/4
OF_PAIRS: list[Callable[..., Tensor]] = [
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
]


CHOSEN, REJECTED = column(LOG3, LOG3), column(-LOG3, LOG3)  # d = 2 log 3 and 0


def close(terms: Tensor, *expected: float) -> None:
    torch.testing.assert_close(terms.tolist(), list(expected))


def test_dpo_and_its_gradient() -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    terms = dpo(chosen, rejected, beta=0.5)
    close(terms, LOG43, math.log(2.0))
    gradients = torch.autograd.grad(terms.sum(), [chosen, rejected])
    close(gradients[0], -0.5 * 0.25, -0.5 * 0.5)  # -beta * (1 - sigmoid)
    close(gradients[1], 0.5 * 0.25, 0.5 * 0.5)


def test_robust_dpo_of_flipped_labels_is_dpo_of_clean_ones_on_average() -> None:
    chosen, rejected = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    robust = partial(robust_dpo, beta=0.7, label_smoothing=0.2)
    mean = 0.8 * robust(chosen, rejected) + 0.2 * robust(rejected, chosen)
    torch.testing.assert_close(mean, dpo(chosen, rejected, beta=0.7))


KL = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
EVEN = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
LOG2 = math.log(2.0)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        # smoothed labels mix in the flipped pair, and robust DPO subtracts the flipped pair
        (dpo(CHOSEN, REJECTED, beta=0.5, label_smoothing=0.1), (0.9 * LOG43 + 0.1 * LOG4, LOG2)),
        (robust_dpo(CHOSEN, REJECTED, beta=0.5, label_smoothing=0.1), ((0.9 * LOG43 - 0.1 * LOG4) / 0.8, LOG2)),
        # IPO is least at its margin: (1 - 2)^2, (2 - 2)^2
        (ipo(column(3.0, 2.0), column(2.0, 0.0), beta=0.25), (1.0, 0.0)),
        (hinge(column(1.0, 9.0), column(0.0, 0.0), beta=0.5), (0.5, 0.0)),
        # EXO is the KL to the smoothed preference: at sigmoid 0.9 nothing is left to learn
        (exo_pair(CHOSEN, REJECTED, beta=0.5, label_smoothing=0.1), (KL, EVEN)),
        (exo_pair(column(math.log(9.0)), column(0.0), beta=1.0, label_smoothing=0.1), (0.0,)),
        # losses of each response by itself
        (nca_pair(CHOSEN, REJECTED, beta=1.0), (LOG43 + 0.5 * LOG4 + 0.5 * LOG43, LOG43 + 0.5 * LOG4 + 0.5 * LOG4)),
        (bco_pair(CHOSEN, REJECTED, beta=1.0, delta=0.0), (2.0 * LOG43, LOG43 + LOG4)),
        (bco_pair(CHOSEN, REJECTED, beta=1.0, delta=LOG3), (LOG2 + math.log(10.0 / 9.0), 2.0 * LOG2)),
        (sppo_hard(column(3.0), column(-1.0), beta=0.25), (1.0 + 1.0,)),  # (3 - 2)^2 + (-1 + 2)^2
        (apo_zero(CHOSEN, REJECTED, beta=1.0), (0.25 + 0.25, 0.25 + 0.75)),
        (apo_down(CHOSEN, REJECTED, beta=1.0), (0.75 + 0.1, 0.75 + 0.5)),  # sigmoid(2 log 3) = 9/10
        # chosen sorted 0, 1; rejected sorted 1 - log 3, -> differences log 3 - 1 + 0, 1 - 1
        (aot_unpaired(column(1.0, 0.0), column(1.0, -LOG3), beta=1.0), (LOG43, LOG2)),
        # x = log 3, temperature 1: the gate between logistic and exponential is 3/4
        (discopop(column(LOG3), column(0.0), beta=1.0, temperature=1.0), (0.25 * LOG43 + 0.75 / 3.0,)),
        (log_odds(column(0.75, 0.5, 1e-9).log()), (LOG3, 0.0, math.log(1e-9 / (1.0 - 1e-9)))),
        (odds_ratio(column(0.75).log(), column(0.5).log()), (LOG43,)),
    ],
)
def test_terms_by_hand(terms: Tensor, expected: tuple[float, ...]) -> None:
    close(terms, *expected)


def test_aot_compares_sorted_margins() -> None:
    # sorted: -log 3, log 3 against 0, 0
    margins, ref_margins = column(LOG3, -LOG3), column(0.0, 0.0)
    close(aot(margins, ref_margins, beta=1.0), LOG4, LOG43)
    close(aot(margins, margins.flip(0), beta=1.0), math.log(2.0), math.log(2.0))  # the same once sorted
    close(aot(margins, ref_margins, beta=1.0, label_smoothing=0.1), 0.9 * LOG4 + 0.1 * LOG43, 0.9 * LOG43 + 0.1 * LOG4)


def test_discopop_far_below_zero_is_logistic_and_finite() -> None:
    chosen = column(-1e4).requires_grad_()
    terms = discopop(chosen, column(0.0), beta=1.0)
    close(terms, 1e4)
    close(torch.autograd.grad(terms.sum(), chosen)[0], -1.0)


def test_simpo_asks_for_a_margin() -> None:
    close(simpo(CHOSEN, REJECTED, beta=0.5, gamma=LOG3), math.log(2.0), LOG4)
    torch.testing.assert_close(
        simpo(CHOSEN, REJECTED, beta=0.5, gamma=0.0, label_smoothing=0.2),
        dpo(CHOSEN, REJECTED, beta=0.5, label_smoothing=0.2),
    )


def test_alphapo_is_simpo_of_transformed_logprobs() -> None:
    # p = 1/2 and 1/4, alpha 1: 1 - 1/p = -1 and -3, so d = 2
    logprobs = column(0.5).log(), column(0.25).log()
    scores = [alphapo_scores(values, alpha=1.0) for values in logprobs]
    close(simpo(*scores, beta=0.5 * LOG3, gamma=0.0), LOG43)
    close(alphapo_scores(logprobs[0], alpha=0.0), math.log(0.5))


def test_odds_of_certainty_are_finite() -> None:
    logprobs = torch.tensor([0.0, 1e-7, -1e-9, -200.0], requires_grad=True)
    odds = log_odds(logprobs)
    (gradient,) = torch.autograd.grad(odds.sum(), logprobs)
    assert odds.isfinite().all()
    assert gradient.isfinite().all()
    assert odds[3] == -200.0


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_one_loss_a_pair_in_its_dtype(loss: Callable[..., Tensor]) -> None:
    chosen = torch.tensor([-1.0, -20.0, -300.0], requires_grad=True)
    terms = loss(chosen, torch.tensor([-300.0, -20.0, -1.0]), beta=0.1)
    assert terms.shape == (3,)
    assert terms.dtype == torch.float32
    assert terms.isfinite().all()
    assert torch.autograd.grad(terms.sum(), chosen)[0].isfinite().all()
    assert loss(torch.zeros(0), torch.zeros(0), beta=0.1).shape == (0,)


@pytest.mark.parametrize("loss", OF_PAIRS)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(loss: Callable[..., Tensor], beta: float) -> None:
    with pytest.raises(ValueError, match="needs beta > 0"):
        loss(CHOSEN, REJECTED, beta=beta)


@pytest.mark.parametrize("loss", [dpo, robust_dpo, exo_pair, aot, aot_unpaired, partial(simpo, gamma=0.5)])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, math.nan])
def test_a_label_smoothing_out_of_range_is_refused(loss: Callable[..., Tensor], label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 0.5\)"):
        loss(CHOSEN, REJECTED, beta=0.1, label_smoothing=label_smoothing)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="the KL to a certain preference is infinite"):
        exo_pair(CHOSEN, REJECTED, beta=0.1, label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"temperature in \(0, 1\], got 0"):
        discopop(CHOSEN, REJECTED, beta=0.1, temperature=0.0)
