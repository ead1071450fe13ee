"""The tree of common prefixes against a comparison of all pairs of sequences."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.prefix_tree import SharedPrefix, shared_with_earlier


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
