"""Games within a group are bounded, connected and balanced, and their summaries agree with independent ones."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from rlhf.rewards.services.pairwise import games, win_rates, winning_chances


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("opponents", [None, 1, 2, 3, 4, 7])
def test_each_response_has_its_games_and_both_places(count: int, opponents: int | None) -> None:
    pairs = games(count, opponents)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(first != second for first, second in pairs)
    most = count - 1 if opponents is None else min(opponents, count - 1)
    most += most % 2 if most < count - 1 else 0  # an odd number is raised
    played = Counter(place for pair in pairs for place in pair)
    assert [played[place] for place in range(count)] == [most] * count
    first = Counter(pair[0] for pair in pairs)
    assert all(abs(2 * first[place] - played[place]) <= 1 for place in range(count))
    reached, edges = {0}, [{*pair} for pair in pairs]
    for _ in range(count):
        reached |= {place for edge in edges if edge & reached for place in edge}
    assert reached == set(range(count))  # the games connect all responses


def test_a_response_without_a_game_has_no_value() -> None:
    assert games(1, None) == games(1, 4) == []
    assert win_rates({}, count=1) == winning_chances({}, count=1) == [None]
    assert win_rates({(0, 1): 1.0}, count=3) == [1.0, 0.0, None]
    assert winning_chances({(0, 1): 0.5}, count=3) == [0.5, 0.5, None]


def test_the_share_of_won_games() -> None:
    assert win_rates({(0, 1): 1.0, (1, 2): 0.5, (0, 2): 0.25}, count=3) == [0.625, 0.25, 0.625]


def test_bradley_terry_maximises_the_likelihood_with_two_games_against_strength_one() -> None:
    draw = random.Random(3)
    pairs = games(7, 4)
    results = [draw.choice([0.0, 0.5, 1.0]) for _ in pairs]
    scores = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)
    first, second = (torch.tensor(column) for column in zip(*pairs, strict=True))
    won = torch.tensor(results, dtype=torch.float64)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margin = scores[first] - scores[second]
        likelihood = won * margin.sigmoid().log() + (1 - won) * (-margin).sigmoid().log()
        prior = scores.sigmoid().log() + (-scores).sigmoid().log()
        total = -likelihood.sum() - prior.sum()
        total.backward()
        return total

    optimizer.step(loss)
    s = scores.detach().tolist()
    wanted = [sum(1 / (1 + math.exp(s[j] - s[i])) for j in range(7) if j != i) / 6 for i in range(7)]
    assert winning_chances(dict(zip(pairs, results, strict=True)), count=7) == pytest.approx(wanted, abs=1e-6)


def test_a_response_that_always_wins_has_a_finite_value_below_one() -> None:
    best, middle, worst = winning_chances({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 0.0}, count=3)
    assert best is not None
    assert worst is not None
    assert middle == pytest.approx(0.5)
    assert 1.0 > best > middle > worst > 0.0
