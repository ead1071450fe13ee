"""rlhf/data/packing.py on cases small enough to do by hand; the laws are in tests/property."""

from __future__ import annotations

import pytest

from rlhf.data.packing import balance, pack, pack_evenly


def test_the_longest_goes_first_and_each_where_it_fits_tightest() -> None:
    # 6 -> bin 0 (4 free); 5 -> bin 1 (5 free); 4 -> bin 0, the tighter (0 free); 3 -> bin 1 (2 free); 2 -> bin 1 (0).
    assert pack([2, 6, 3, 5, 4], max_tokens=10) == [[1, 4], [0, 2, 3]]
    assert pack([8, 8], max_tokens=8) == [[0], [1]]
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, more than the 8"):
        pack([8, 9], max_tokens=8)


def test_bins_are_even_where_that_needs_no_more_of_them() -> None:
    # Best fit makes [5, 4] and [2]; by turns 5 | 4 2 are 5 and 6 of 9.
    assert pack([5, 2, 4], max_tokens=9) == [[0, 2], [1]]
    assert pack_evenly([5, 2, 4], max_tokens=9) == [[0], [1, 2]]
    # Full bins leave no choice: by turns 6 3 2 | 5 4 would be 11 of 10.
    assert pack_evenly([2, 6, 3, 5, 4], max_tokens=10) == pack([2, 6, 3, 5, 4], max_tokens=10)


def test_the_costliest_goes_to_the_rank_with_least() -> None:
    # 7 -> rank 0; 6 -> rank 1; 5 -> rank 1 (6 < 7): 11; 4 -> rank 0: 11; 1 -> rank 0 (as much, fewer... both 2): 12.
    assert balance([7, 6, 5, 4, 1], 2) == [[0, 3, 4], [1, 2]]
    assert balance([0.0, 0.0, 0.0], 3) == [[0], [1], [2]]
    for costs, ranks, message in ([-1.0], 2, "from 0"), ([float("nan")], 2, "from 0"), ([1.0], 0, "num_ranks is 0"):
        with pytest.raises(ValueError, match=message):
            balance(costs, ranks)
