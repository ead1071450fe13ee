"""Estimate metrics from several samples per prompt, with intervals over prompts.

The module does pure arithmetic on numbers. Prompts are resampled, because the samples of a prompt are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_NUMBERS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    value: float
    low: float | None  # None: a single prompt gives no interval
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.4g}{interval}"


def pass_at_k(passed: Sequence[bool], *, k: int) -> float:
    """Return the probability that at least one of k samples passes, for c passes among n samples.

    The probability is 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, eq. 1): the mean over all choices of k of the n
    samples, hence unbiased. ValueError unless 1 <= k <= n.
    """
    n = len(passed)
    _check_k(k, n)
    return 1.0 - float(Fraction(comb(n - sum(passed), k), comb(n, k)))


def maj_at_k(answers: Sequence[str | None], passed: Sequence[bool], *, k: int) -> float:
    """Return the probability that the majority answer of k samples is right.

    Self-consistency, arXiv:2203.11171; maj1@k of arXiv:2206.14858. Like pass_at_k, the result is the exact mean over
    all choices of k of the n samples. The papers leave three cases open. Tied answers share the win evenly. None is a
    sample without an answer and without a vote, and a choice without any vote is lost. If only some samples of an
    answer pass, the passing share counts. ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    _check_k(k, n)
    votes = Counter(answer for answer in answers if answer is not None)
    right = Counter(answer for answer, good in zip(answers, passed, strict=True) if good and answer is not None)
    silent = n - votes.total()
    won = Fraction(0)
    for answer, count in right.items():
        others = [votes[other] for other in votes if other != answer]
        won += Fraction(count, votes[answer]) * _choices_won(votes[answer], others, silent, k)
    return float(won / comb(n, k))


def win_chance(scores: Sequence[float], against: Sequence[float]) -> float:
    """Return the share of pairs (ours, theirs) for one prompt with a higher score for ours; ties count half."""
    if not scores or not against:
        raise ValueError(f"win_chance needs scores on both sides, got {len(scores)} and {len(against)}")
    wins = sum((ours > theirs) + 0.5 * (ours == theirs) for ours in scores for theirs in against)
    return wins / (len(scores) * len(against))


def better_chance(values: Sequence[float], against: Sequence[float], *, seed: int) -> float:
    """Return the probability that the mean of `values` is higher than the mean of `against`, value by value of the same
    prompts: the share of bootstrap resamples of the prompts (Efron, 1979) with a higher mean. A tie counts half."""
    differences = np.asarray(values, dtype=np.float64) - np.asarray(against, dtype=np.float64)
    means = _resampled_ratios(differences, np.ones(len(differences)), seed=seed)
    return float(np.mean(means > 0.0) + 0.5 * np.mean(means == 0.0))


def mean_estimate(values: Sequence[float], *, seed: int) -> Estimate:
    """Return the mean of a number per prompt, with the percentile bootstrap interval (Efron, 1979) at LEVEL."""
    return ratio_estimate(values, [1.0] * len(values), seed=seed)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float], *, seed: int) -> Estimate:
    """Return sum(numerators) / sum(denominators), such as a mean over the tokens of all rows; rows are resampled.

    The same seed draws the same rows. ValueError without rows, or if a denominator is not positive.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    rows = len(above)
    if not rows or len(below) != rows or not (below > 0.0).all():
        raise ValueError(f"an estimate needs rows with positive denominators, got {rows} and {list(denominators)[:4]}")
    value = float(above.sum() / below.sum())
    if rows == 1:
        return Estimate(value=value, low=None, high=None)
    low, high = np.quantile(_resampled_ratios(above, below, seed=seed), [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Estimate(value=value, low=float(low), high=float(high))


def _resampled_ratios(above: np.ndarray, below: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the ratio of sums in each bootstrap resample of the rows."""
    generator, rows = np.random.default_rng(seed), len(above)
    resampled: list[float] = []
    while len(resampled) < RESAMPLES:
        count = min(RESAMPLES - len(resampled), max(1, _NUMBERS_AT_ONCE // rows))
        drawn = generator.integers(0, rows, size=(count, rows))
        resampled += (above[drawn].sum(axis=1) / below[drawn].sum(axis=1)).tolist()
    return np.asarray(resampled)


def powers_of_two(samples: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to the number of samples: the default values of k."""
    return tuple(2**i for i in range(samples.bit_length()))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected 1 to the number of samples, {n}")


def _choices_won(count: int, others: Sequence[int], silent: int, k: int) -> Fraction:
    """Return the number of choices of k samples won by an answer with `count` samples; an m-way tie counts 1 / m."""
    won = Fraction(0)
    for votes in range(1, min(count, k) + 1):
        left = k - votes
        choices = {(drawn, 0): comb(silent, drawn) for drawn in range(min(silent, left) + 1)}  # (samples drawn, ties)
        for other in others:
            longer: Counter[tuple[int, int]] = Counter()
            for (drawn, ties), number in choices.items():
                for more in range(min(other, votes, left - drawn) + 1):
                    longer[drawn + more, ties + (more == votes)] += number * comb(other, more)
            choices = dict(longer)
        shared = [Fraction(number, 1 + ties) for (drawn, ties), number in choices.items() if drawn == left]
        won += comb(count, votes) * sum(shared, Fraction(0))
    return won
