"""Sums, means and moments over the masked tokens."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.masking import (
    Moments,
    masked_sum,
    moments,
    sequence_counts,
    sequence_means,
    sequence_sums,
    to_tokens,
)

VALUES = torch.tensor([1.0, math.nan, 3.0, 10.0, 20.0])
MASK = torch.tensor([True, False, True, False, True])
LENGTHS = torch.tensor([3, 0, 2])


def test_reductions_read_no_masked_entry() -> None:
    assert masked_sum(VALUES, MASK) == 24.0  # 1 + 3 + 20
    assert sequence_sums(torch.where(MASK, VALUES, 5.0), LENGTHS).tolist() == [9.0, 0.0, 25.0]
    assert sequence_counts(MASK, LENGTHS).tolist() == [2, 0, 1]
    assert sequence_means(VALUES, MASK, LENGTHS).tolist() == [2.0, 0.0, 20.0]  # (1 + 3) / 2, nothing, 20 / 1
    assert to_tokens(torch.tensor([7.0, 8.0, 9.0]), LENGTHS, num_tokens=5).tolist() == [7.0, 7.0, 7.0, 9.0, 9.0]


def test_a_sequence_sum_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000)
    alone = sequence_sums(values[300:900], torch.tensor([600]))
    together = sequence_sums(values, torch.tensor([300, 600, 100]))
    assert torch.equal(alone[0], together[1])


def test_moments() -> None:
    found = moments(torch.tensor([1.0, 100.0, 3.0, 5.0]), torch.tensor([True, False, True, True]))
    assert found == Moments(count=3, mean=3.0, squared_deviation=8.0)  # (1-3)^2 + 0 + (5-3)^2
    assert found.variance == 4.0  # 8 / 2
    far = torch.tensor([1e8, 1e8 + 8.0, 1e8 + 16.0])  # exact in float32, whose squares are not
    assert moments(far, torch.ones(3, dtype=torch.bool)).variance == 64.0


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_have_no_variance(count: int) -> None:
    with pytest.raises(ValueError, match="at least 2 values"):
        _ = Moments(count=count, mean=0.0, squared_deviation=0.0).variance
