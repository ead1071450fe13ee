"""Sums, means and moments over the masked tokens."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.masking import (
    Moments,
    masked_mean,
    masked_sum,
    merge_moments,
    moments,
    sequence_counts,
    sequence_means,
    sequence_sums,
    to_tokens,
)

VALUES = torch.tensor([1.0, math.nan, 3.0, 10.0, 20.0])
MASK = torch.tensor([True, False, True, False, True])
LENGTHS = torch.tensor([3, 0, 2])


def test_masked_entries_do_not_enter_sum_or_mean() -> None:
    assert masked_sum(VALUES, MASK) == 24.0  # 1 + 3 + 20
    assert masked_mean(VALUES, MASK) == 8.0  # 24 / 3


def test_mean_of_nothing_is_zero() -> None:
    assert masked_mean(VALUES, torch.zeros(5, dtype=torch.bool)) == 0.0


def test_per_sequence_reductions() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    assert sequence_sums(values, LENGTHS).tolist() == [6.0, 0.0, 30.0]
    assert sequence_counts(MASK, LENGTHS).tolist() == [2, 0, 1]
    assert sequence_means(VALUES, MASK, LENGTHS).tolist() == [2.0, 0.0, 20.0]  # (1 + 3) / 2, nothing, 20 / 1


def test_a_number_a_sequence_is_repeated_over_its_tokens() -> None:
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


def test_moments_of_parts_merge_to_those_of_the_whole() -> None:
    torch.manual_seed(0)
    values, mask = 1e4 + torch.randn(60, dtype=torch.float64), torch.rand(60) > 0.3
    nothing = torch.zeros(60, dtype=torch.bool)
    parts = [moments(values, nothing)] + [moments(values[i : i + 20], mask[i : i + 20]) for i in (0, 20, 40)]
    whole, merged = moments(values, mask), merge_moments(parts)
    assert merged.count == whole.count
    assert merged.mean == pytest.approx(whole.mean, rel=1e-15)
    assert merged.variance == pytest.approx(whole.variance, rel=1e-9)


def test_moments_keep_their_digits_beside_a_large_mean() -> None:
    values = torch.tensor([1e8, 1e8 + 8.0, 1e8 + 16.0])  # exact in float32, whose squares are not
    assert moments(values, torch.ones(3, dtype=torch.bool)).variance == 64.0


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_have_no_variance(count: int) -> None:
    with pytest.raises(ValueError, match="at least 2 values"):
        _ = Moments(count=count, mean=0.0, squared_deviation=0.0).variance
