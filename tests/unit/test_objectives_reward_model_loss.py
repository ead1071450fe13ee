"""Losses of reward models and their calibration, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.objectives.reward_model_loss import (
    bradley_terry,
    calibration_bins,
    centering,
    combined_steps,
    step_cross_entropy,
)
from rlhf.tracking.metrics.reductions import CalibrationError

LOG3 = math.log(3.0)
CHOSEN, REJECTED = torch.tensor([LOG3, 0.0], dtype=torch.float64), torch.tensor([0.0, LOG3], dtype=torch.float64)


def test_bradley_terry() -> None:
    torch.testing.assert_close(bradley_terry(CHOSEN, REJECTED).tolist(), [math.log(4 / 3), math.log(4.0)])
    margin = torch.tensor([LOG3, -LOG3], dtype=torch.float64)  # taken off the difference
    torch.testing.assert_close(bradley_terry(CHOSEN, REJECTED, margin=margin).tolist(), [math.log(2.0)] * 2)


def test_centering() -> None:
    torch.testing.assert_close(centering(CHOSEN, CHOSEN).tolist(), [(2.0 * LOG3) ** 2, 0.0])


def test_steps_are_scored_where_they_end() -> None:
    scores = torch.tensor([LOG3, math.nan, LOG3, LOG3], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, math.nan, 0.0, 0.5], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    terms = step_cross_entropy(scores, labels, mask)
    half = 0.5 * (math.log(4 / 3) + math.log(4.0))
    torch.testing.assert_close(terms.tolist(), [math.log(4 / 3), 0.0, math.log(4.0), half])
    (gradient,) = torch.autograd.grad(terms.sum(), scores)
    torch.testing.assert_close(gradient.tolist(), [-0.25, 0.0, 0.75, 0.25])  # sigmoid - label


@pytest.mark.parametrize("label", [-0.1, 1.5, math.nan])
def test_a_label_that_is_no_probability_is_refused(label: float) -> None:
    with pytest.raises(ValueError, match=r"labels in \[0, 1\]"):
        step_cross_entropy(torch.zeros(1), torch.tensor([label]), torch.tensor([True]))


def error(bins: Tensor) -> float:
    rows = [(float(pairs), float(confidence), float(right)) for pairs, confidence, right in bins]
    halves = (CalibrationError(bins=tuple((0.5 * a, 0.5 * b, 0.5 * c) for a, b, c in rows)) for _ in range(2))
    return next(halves).merge(next(halves)).result()  # bins add up


def test_calibration() -> None:
    # confidences 0.75, 0.75, 0.9 and 0.5, in bins from 0.5, 0.7 and so on; right, wrong, right, even
    margins = torch.tensor([LOG3, -LOG3, math.log(9.0), 0.0])
    bins = calibration_bins(margins, num_bins=2)
    expected = [[1.0, 0.5, 0.5], [3.0, 2.4, 2.0]]
    torch.testing.assert_close(bins.tolist(), expected)
    torch.testing.assert_close(error(bins), 0.4 / 4)  # |2 - 2.4| of 4 pairs
    parts = calibration_bins(margins[:1], num_bins=2) + calibration_bins(margins[1:], num_bins=2)
    torch.testing.assert_close(parts, bins)


def test_scores_that_are_log_odds_are_calibrated() -> None:
    margins = torch.tensor([LOG3] * 3 + [-LOG3], dtype=torch.float64)  # right three times in four
    torch.testing.assert_close(error(calibration_bins(margins, num_bins=10)), 0.0)
    sure = calibration_bins(100.0 * margins, num_bins=10)  # says 1, is right three times in four
    torch.testing.assert_close(error(sure), 0.25)


def test_calibration_of_nothing_is_nan_and_of_no_numbers_refused() -> None:
    assert math.isnan(error(calibration_bins(torch.zeros(0), num_bins=3)))
    with pytest.raises(ValueError, match="num_bins >= 1"):
        calibration_bins(torch.zeros(1), num_bins=0)
    with pytest.raises(ValueError, match="got nan"):
        calibration_bins(torch.tensor([math.nan]), num_bins=3)


@pytest.mark.parametrize(("by", "first"), [("min", 0.25), ("mean", 0.5), ("product", 0.75 * 0.5 * 0.25)])
def test_what_steps_come_to(by: Any, first: float) -> None:
    """The steps of the first response have probabilities 3/4, 1/2 and 1/4, and the step of the second 3/4."""
    scores = torch.tensor([9.0, LOG3, 0.0, -9.0, -LOG3, 9.0, LOG3], dtype=torch.float64)
    ends = torch.tensor([False, True, True, False, True, False, True])
    found = combined_steps(scores, ends, torch.tensor([5, 2]), by=by)
    torch.testing.assert_close(found.tolist(), [first, 0.75])


def test_a_response_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="one of these has none"):
        combined_steps(torch.zeros(3), torch.tensor([True, False, False]), torch.tensor([2, 1]), by="min")
