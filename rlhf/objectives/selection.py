"""Select among a prompt's responses by their scores, without torch: `rlhf plan` imports this module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def best(scores: Sequence[float], count: int) -> list[int]:
    """Return the indices of the highest scores, ascending. Ties take the first.

    ValueError unless 1 <= count <= len(scores).
    """
    _check(scores, count)
    return sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])


def most_spread(scores: Sequence[float], count: int) -> list[int]:
    """Return the indices of the scores with the largest variance, ascending (PODS, arXiv:2504.13818).

    The selected scores are among the highest and the lowest. ValueError unless 1 <= count <= len(scores).
    """
    _check(scores, count)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    middle = sum(scores) / len(scores)
    centered = [scores[index] - middle for index in order]  # a large mean would cost digits
    sums = list(accumulate(centered, initial=0.0))
    squares = list(accumulate((value * value for value in centered), initial=0.0))

    def spread(highest: int) -> float:
        lowest = len(order) - (count - highest)
        total = sums[highest] + sums[-1] - sums[lowest]
        return (squares[highest] + squares[-1] - squares[lowest]) / count - (total / count) ** 2

    highest = max(range(count + 1), key=spread)
    return sorted(order[:highest] + order[len(order) - (count - highest) :])


def _check(scores: Sequence[float], count: int) -> None:
    if not 1 <= count <= len(scores):
        raise ValueError(f"expected to keep 1 to {len(scores)} of so many scores, got {count}")
