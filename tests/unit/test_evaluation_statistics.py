"""Hand-worked numbers, and a count of all choices beside the closed forms."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from rlhf.evaluation.statistics import (
    Estimate,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    powers_of_two,
    ratio_estimate,
    win_chance,
)


def test_pass_and_maj_at_k_are_means_over_all_choices() -> None:
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randint(1, 7)
        answers = [draw.choice(["a", "b", "c", None]) for _ in range(n)]
        passed = [draw.random() < 0.5 for _ in range(n)]
        passes = {a: [p for b, p in zip(answers, passed, strict=True) if a == b] for a in answers if a is not None}
        value = {answer: np.mean(shares) for answer, shares in passes.items()}
        for k in range(1, n + 1):
            choices = list(itertools.combinations(range(n), k))
            won = 0.0
            for choice in choices:
                votes = Counter(answers[i] for i in choice if answers[i] is not None)
                best = [a for a, count in votes.items() if count == max(votes.values())]
                won += sum(value[a] for a in best) / len(best) if best else 0.0
            assert maj_at_k(answers, passed, k=k) == pytest.approx(won / len(choices))
            some = np.mean([any(passed[i] for i in choice) for choice in choices])
            assert pass_at_k(passed, k=k) == pytest.approx(some)


def test_many_samples_stay_finite_and_k_is_at_most_the_samples() -> None:
    """C(2000, 1000) is beyond a float."""
    assert pass_at_k([True] + [False] * 1999, k=1000) == pytest.approx(0.5)
    assert maj_at_k(["a"] * 40 + ["b"] * 24, [True] * 40 + [False] * 24, k=1) == pytest.approx(40 / 64)
    for k in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to the number of samples, 2"):
            pass_at_k([True, False], k=k)
        with pytest.raises(ValueError, match="expected 1 to the number of samples, 2"):
            maj_at_k(["a", "b"], [True, False], k=k)


def test_win_chance_by_hand() -> None:
    """(1, 0) against (0, 0.5): 1 > 0, 1 > 0.5, 0 = 0 a half, 0 < 0.5: 2.5 of 4."""
    assert win_chance([1.0, 0.0], [0.0, 0.5]) == pytest.approx(0.625)
    assert win_chance([1.0], [1.0]) == 0.5
    with pytest.raises(ValueError, match="both sides"):
        win_chance([], [1.0])


def test_estimates_by_hand() -> None:
    """(3 + 1) / (2 + 6); resampled rows give 3/2, 1/6 or 4/8; the outer two, a quarter each, are the ends of 95 %."""
    found = ratio_estimate([3.0, 1.0], [2.0, 6.0], seed=0)
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), pytest.approx(1 / 6), pytest.approx(1.5))
    assert mean_estimate([1.0], seed=0) == Estimate(value=1.0, low=None, high=None)
    assert mean_estimate([2.0] * 9, seed=0) == Estimate(value=2.0, low=2.0, high=2.0)
    with pytest.raises(ValueError, match="positive denominators"):
        ratio_estimate([1.0], [0.0], seed=0)


def test_the_interval_is_that_of_a_large_sample() -> None:
    """Mean of 400 with standard deviation 1: 1.96 / 20 on either side."""
    values = np.random.default_rng(3).standard_normal(400)
    values = (values - values.mean()) / values.std()
    found = mean_estimate(values.tolist(), seed=1)
    assert found.low == pytest.approx(-0.098, abs=0.008)
    assert found.high == pytest.approx(0.098, abs=0.008)
    assert found == mean_estimate(values.tolist(), seed=1)
    assert found != mean_estimate(values.tolist(), seed=2)

    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]
