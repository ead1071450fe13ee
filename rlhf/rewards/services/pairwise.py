"""Choose which responses of a group are compared, and turn the results into a value for each response.

Pure functions. A game is a pair of responses, and its result the share won by the first response.
"""

from __future__ import annotations

from collections.abc import Sequence

_TOLERANCE = 1e-10
_MAX_ROUNDS = 10_000


def games(count: int, opponents: int | None) -> list[tuple[int, int]]:
    """Return the games of `count` responses, each against `opponents` others, or against all others for None.

    The responses form a ring, and each plays against its next neighbours, so the games connect all responses. Each
    response comes first as often as second (one game more or less for an odd number of opponents). With an odd count
    and an odd number of opponents each response has one opponent more.
    """
    most = count - 1 if opponents is None else min(opponents, count - 1)
    halves = most % 2 == 1 and count % 2 == 0  # a last game against the response across the ring
    steps = most // 2 if halves else -(-most // 2)
    ring = [(place, (place + step) % count) for step in range(1, steps + 1) for place in range(count)]
    across = [(place, place + count // 2) for place in range(count // 2 if halves else 0)]
    return ring + [pair if pair[0] % 2 == 0 else (pair[1], pair[0]) for pair in across]


def win_rates(pairs: Sequence[tuple[int, int]], results: Sequence[float], *, count: int) -> list[float]:
    """Return the share of its games that each response has won. ValueError: a response without a game."""
    won, played = _totals(pairs, results, count)
    return [wins / games for wins, games in zip(won, played, strict=True)]


def winning_chances(pairs: Sequence[tuple[int, int]], results: Sequence[float], *, count: int) -> list[float]:
    """Return each response's mean probability of winning against the others, by a fit of Bradley and Terry's model.

    A response beats another with the probability s_i / (s_i + s_j). The strengths s come from the iteration of Hunter
    (2004), MM algorithms for generalized Bradley-Terry models, eq. 3. A game won and a game lost against an opponent of
    strength 1 are added for each response, so an unbeaten response has a finite strength. ValueError: as in win_rates.
    """
    won, _ = _totals(pairs, results, count)
    strengths = [1.0] * count
    for _ in range(_MAX_ROUNDS):
        weights = [2.0 / (strength + 1.0) for strength in strengths]
        for first, second in pairs:
            share = 1.0 / (strengths[first] + strengths[second])
            weights[first] += share
            weights[second] += share
        newer = [(wins + 1.0) / weight for wins, weight in zip(won, weights, strict=True)]
        change = max(abs(new - old) / old for new, old in zip(newer, strengths, strict=True))
        strengths = newer
        if change < _TOLERANCE:
            break
    return [
        sum(mine / (mine + other) for place, other in enumerate(strengths) if place != me) / (count - 1)
        for me, mine in enumerate(strengths)
    ]


def _totals(pairs: Sequence[tuple[int, int]], results: Sequence[float], count: int) -> tuple[list[float], list[int]]:
    won, played = [0.0] * count, [0] * count
    for (first, second), result in zip(pairs, results, strict=True):
        won[first] += result
        won[second] += 1.0 - result
        played[first] += 1
        played[second] += 1
    if 0 in played:
        raise ValueError(f"response {played.index(0)} of {count} is in no game")
    return won, played
