"""Losses of reward models and their calibration, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.objectives.reward_model_loss import calibration_bins, combined_steps, step_cross_entropy
from rlhf.tracking.metrics.reductions import CalibrationError

LOG3 = math.log(3.0)


def test_steps_are_scored_where_they_end() -> None:
    scores = torch.tensor([LOG3, math.nan, LOG3, LOG3], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, math.nan, 0.0, 0.5], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    terms = step_cross_entropy(scores, labels, mask)
    half = 0.5 * (math.log(4 / 3) + math.log(4.0))
    torch.testing.assert_close(terms.tolist(), [math.log(4 / 3), 0.0, math.log(4.0), half])
    (gradient,) = torch.autograd.grad(terms.sum(), scores)
    torch.testing.assert_close(gradient.tolist(), [-0.25, 0.0, 0.75, 0.25])  # sigmoid - label


def error(bins: Tensor) -> float:
    rows = [(float(pairs), float(confidence), float(right)) for pairs, confidence, right in bins]
    halves = (CalibrationError(bins=tuple((0.5 * a, 0.5 * b, 0.5 * c) for a, b, c in rows)) for _ in range(2))
    return next(halves).merge(next(halves)).result()  # bins add up


def test_calibration() -> None:
    # confidences 0.75, 0.75, 0.9 and 0.5, in bins from 0.5, 0.7 and so on; right, wrong, right, even
    margins = torch.tensor([LOG3, -LOG3, math.log(9.0), 0.0])
    bins = calibration_bins(margins, num_bins=2)
    torch.testing.assert_close(bins.tolist(), [[1.0, 0.5, 0.5], [3.0, 2.4, 2.0]])
    torch.testing.assert_close(error(bins), 0.4 / 4)  # |2 - 2.4| of 4 pairs
    assert math.isnan(error(calibration_bins(torch.zeros(0), num_bins=3)))
    margins = torch.tensor([LOG3] * 3 + [-LOG3], dtype=torch.float64)  # right three times in four
    torch.testing.assert_close(error(calibration_bins(margins, num_bins=10)), 0.0)
    torch.testing.assert_close(error(calibration_bins(100.0 * margins, num_bins=10)), 0.25)  # says 1


def test_a_response_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="one of these has none"):
        combined_steps(torch.zeros(3), torch.tensor([True, False, False]), torch.tensor([2, 1]), by="min")
