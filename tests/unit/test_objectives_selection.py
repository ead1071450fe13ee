"""The kept responses are the best of all sets of the same size."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from rlhf.objectives.selection import best, most_spread


def test_best() -> None:
    assert best([0.5, 2.0, -1.0, 2.0, 2.0], 2) == [1, 3]  # of equals the first
    assert best([0.5, 2.0, -1.0], 3) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_most_spread_has_the_variance_of_the_best_of_all_sets(count: int) -> None:
    draw = random.Random(count)
    for offset in (0.0, 1e6):
        for _ in range(20):
            scores = [offset + draw.choice([0.0, 1.0, draw.random()]) for _ in range(6)]
            found = most_spread(scores, count)
            assert found == sorted(set(found))
            assert len(found) == count
            most = max(statistics.pvariance(one) for one in itertools.combinations(scores, count))
            assert statistics.pvariance([scores[place] for place in found]) == pytest.approx(most, abs=1e-9)


@pytest.mark.parametrize("count", [0, 3])
def test_no_more_than_there_are(count: int) -> None:
    for choose in (best, most_spread):
        with pytest.raises(ValueError, match=f"keep 1 to 2 of so many scores, got {count}"):
            choose([1.0, 2.0], count)
