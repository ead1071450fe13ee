"""Packing on cases small enough to do by hand, and common prefixes by comparing all pairs of sequences."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.packing import balance, pack, pack_evenly
from rlhf.data.prefix_tree import SharedPrefix, shared_with_earlier


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


def test_a_prefix_belongs_to_the_first_sequence_that_has_all_of_it() -> None:
    sequences = [[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6], [7], [1, 2]]
    found = shared_with_earlier((np.array(one), len(one)) for one in sequences)
    assert found == [None, SharedPrefix(0, 2), SharedPrefix(1, 3), None, SharedPrefix(0, 2)]


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=7), st.integers(0, 7)), max_size=12))
def test_shared_prefixes_are_the_longest_of_all_pairs(rows: list[tuple[list[int], int]]) -> None:
    rows = [(tokens, min(most, len(tokens))) for tokens, most in rows]
    found = shared_with_earlier((np.array(tokens, np.int64), most) for tokens, most in rows)
    for row, ((tokens, most), prefix) in enumerate(zip(rows, found, strict=True)):
        pairs = [zip(tokens[:most], earlier, strict=False) for earlier, _ in rows[:row]]
        common = [len(list(takewhile(lambda pair: pair[0] == pair[1], one))) for one in pairs]
        longest = max(common, default=0)
        assert prefix == (SharedPrefix(common.index(longest), longest) if longest else None)
