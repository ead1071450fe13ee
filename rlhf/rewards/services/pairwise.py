"""Choose which responses of a group are compared, and turn the results into a value for each response.

Pure functions. A game is a pair of responses, and its result the share won by the first response.
"""

from __future__ import annotations

from collections.abc import Mapping

Game = tuple[int, int]  # positions of two responses in their group

_TOLERANCE = 1e-10
_MAX_ROUNDS = 10_000


def games(count: int, opponents: int | None) -> list[Game]:
    """Return the games of `count` responses, each against `opponents` further responses, or against all further
    responses if `opponents` is None.

    The responses form a ring, and each plays against its next neighbours on both sides, so the games connect all
    responses. An odd number of opponents is raised by one, up to all others. Each response comes first as often as
    second, with a difference of at most one game.
    """
    most = count - 1 if opponents is None else min(opponents, count - 1)
    return [
        (place, (place + step) % count)
        for step in range(1, -(-most // 2) + 1)
        for place in range(count // 2 if 2 * step == count else count)  # across the ring both sides are one
    ]


def win_rates(results: Mapping[Game, float], *, count: int) -> list[float | None]:
    """Return the share of its games that each response has won. None: the response has no game."""
    won, played = _totals(results, count)
    return [wins / games if games else None for wins, games in zip(won, played, strict=True)]


def winning_chances(results: Mapping[Game, float], *, count: int) -> list[float | None]:
    """Return each response's mean probability of winning against the others, by a fit of Bradley and Terry's model.

    A response beats another with the probability s_i / (s_i + s_j). The strengths s come from the iteration of Hunter
    (2004), MM algorithms for generalized Bradley-Terry models. A game won and a game lost against an opponent of
    strength 1 are added for each response, so an unbeaten response has a finite strength. None: as in win_rates.
    """
    won, played = _totals(results, count)
    strengths = [1.0] * count
    for _ in range(_MAX_ROUNDS):
        weights = [2.0 / (strength + 1.0) for strength in strengths]
        for first, second in results:
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
        if played[me]
        else None
        for me, mine in enumerate(strengths)
    ]


def _totals(results: Mapping[Game, float], count: int) -> tuple[list[float], list[int]]:
    won, played = [0.0] * count, [0] * count
    for (first, second), result in results.items():
        won[first] += result
        won[second] += 1.0 - result
        played[first] += 1
        played[second] += 1
    return won, played
