"""GAE, rewards to go, whitening and group advantages, by hand."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.advantages import (
    gae,
    greedy_centered,
    group_best_margin,
    group_best_normalized,
    group_centered,
    group_normalized,
    leave_one_out,
    length_weighted_centered,
    reward_to_go,
    steps_centered,
    steps_normalized,
    uneven_group_scale,
    whiten,
)
from tests.fixtures.tensors import column


def test_gae_of_two_sequences() -> None:
    # gamma 0.5, lambda 0.5, so gamma * lambda = 0.25
    # first:  delta_1 = 1 + 0.5 * 0 - 2 = -1;  delta_0 = 0 + 0.5 * 2 - 1 = 0
    #         A_1 = -1;  A_0 = 0 + 0.25 * -1 = -0.25;  returns = A + V = 0.75, 1
    # second: delta = 4 - 3 = 1; return 4. Its value must not leak into the first sequence.
    advantages, returns = gae(
        column(0, 1, 4),
        column(1, 2, 3),
        torch.ones(3, dtype=torch.bool),
        torch.tensor([2, 1]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [-0.25, -1.0, 1.0]
    assert returns.tolist() == [0.75, 1.0, 4.0]


def test_gae_steps_over_what_was_not_sampled() -> None:
    mask = torch.tensor([False, True, False, False, True, False])
    rewards = column(9, 0, 9, math.nan, 1, 9)
    values = column(7, 1, 7, math.nan, 2, 7)
    advantages, returns = gae(rewards, values, mask, torch.tensor([6]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.0, -0.25, 0.0, 0.0, -1.0, 0.0]  # the first sequence above
    assert returns.tolist() == [0.0, 0.75, 0.0, 0.0, 1.0, 0.0]


def test_gae_of_sequences_without_a_sampled_token() -> None:
    mask = torch.tensor([False, False, True, False])
    advantages, _ = gae(column(1, 1, 1, 1), column(0, 0, 0, 0), mask, torch.tensor([2, 0, 1, 1]), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_gae_of_nothing() -> None:
    mask = torch.zeros(2, dtype=torch.bool)
    advantages, returns = gae(column(1, 1), column(1, 1), mask, torch.tensor([2]), gamma=1.0, lam=1.0)
    assert advantages.tolist() == returns.tolist() == [0.0, 0.0]


def test_reward_to_go() -> None:
    mask = torch.tensor([True, False, True, True, True])
    # 4 alone; 2; 1 + 0.5 * 2 = 2 steps over the hole: from token 0, token 2 is one step away
    sums = reward_to_go(column(1, 100, 2, 0, 4), mask, torch.tensor([3, 2]), gamma=0.5)
    assert sums.tolist() == [2.0, 0.0, 2.0, 2.0, 4.0]


def test_whiten() -> None:
    whitened = whiten(column(1, 5, 99), torch.tensor([True, True, False]), mean=3.0, variance=4.0, eps=0.0)
    assert whitened.tolist() == [-1.0, 1.0, 0.0]


SCORES = column(0, 1, 2, 5, 5, 8)  # groups (0, 1, 2) and (5, 5, 8)


def test_group_centered() -> None:
    assert group_centered(SCORES, group_size=3).tolist() == [-1.0, 0.0, 1.0, -1.0, -1.0, 2.0]  # means 1 and 6


def test_group_normalized() -> None:
    # stds: sqrt((1 + 0 + 1) / 2) = 1 and sqrt((1 + 1 + 4) / 2) = sqrt 3; eps 1 shows where it is added
    normalized = group_normalized(SCORES, group_size=3, eps=1.0)
    root = math.sqrt(3.0) + 1.0
    torch.testing.assert_close(normalized.tolist(), [-0.5, 0.0, 0.5, -1 / root, -1 / root, 2 / root])


def test_equal_scores_teach_nothing() -> None:
    assert group_normalized(column(0.1, 0.1, 0.1), group_size=3, eps=1e-4).abs().max() < 1e-9


def test_leave_one_out() -> None:
    # 0 - (1 + 2) / 2, 1 - (0 + 2) / 2, 2 - (0 + 1) / 2
    assert leave_one_out(SCORES, group_size=3).tolist()[:3] == [-1.5, 0.0, 1.5]


def test_flat_groups_are_scaled_away() -> None:
    assert uneven_group_scale(column(0, 1, 2, 5, 5, 5, 1, 1, 1), group_size=3) == 3.0  # one of three
    assert uneven_group_scale(SCORES, group_size=3) == 1.0
    assert uneven_group_scale(column(4, 4, 4), group_size=3) == 1.0


def test_best_of_group() -> None:
    assert group_best_margin(SCORES, group_size=3, k=3).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 3.0]
    assert group_best_margin(column(4, 4, 1), group_size=3, k=3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_best_of_k_is_what_listing_all_sets_of_k_gives(k: int) -> None:
    scores = [[2.0, -1.0, 2.0, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]]
    margins, normalized = [], []
    for group in scores:
        sets = list(itertools.combinations(range(5), k))
        bests = [max(group[i] for i in one) for one in sets]
        mean, std = statistics.mean(bests), statistics.pstdev(bests)
        for i in range(5):
            own = [(one, best) for one, best in zip(sets, bests, strict=True) if i in one]
            margins.append(sum(best - max(group[j] for j in one if j != i) for one, best in own) / len(sets))
            normalized.append((statistics.mean(best for _, best in own) - mean) / std if std else 0.0)
    whole = column(*scores[0], *scores[1])
    assert group_best_margin(whole, group_size=5, k=k).tolist() == pytest.approx(margins, abs=1e-12)
    if k < 5:
        found = group_best_normalized(whole, group_size=5, k=k, eps=1e-6)
        assert found.tolist() == pytest.approx(normalized, abs=1e-12)


def test_pass_at_k_of_right_and_wrong_answers_is_the_published_formula() -> None:
    # arXiv:2508.10751 for 2 right of 6 and k 3: 1 - C(4, 3) / C(6, 3) = 0.8 of the sets have a right one
    found = group_best_normalized(column(0, 1, 0, 0, 1, 0), group_size=6, k=3, eps=1e-6)
    right = (1 - 0.8) / math.sqrt(0.8 * 0.2)
    wrong = (1 - 0.8 - 3 / 10) / math.sqrt(0.8 * 0.2)  # C(3, 2) / C(5, 2) of a wrong one's sets have none
    assert found.tolist() == pytest.approx([wrong, right, wrong, wrong, right, wrong])
    assert group_best_normalized(column(1, 1, 1, 0), group_size=4, k=2, eps=1e-6).tolist() == [0.0] * 4  # none fails


def test_with_k_1_it_is_the_score_against_its_group() -> None:
    centered = SCORES - SCORES.view(2, 3).mean(1, keepdim=True).expand(2, 3).flatten()
    std = SCORES.view(2, 3).std(1, unbiased=False, keepdim=True).expand(2, 3).flatten()
    torch.testing.assert_close(group_best_normalized(SCORES, group_size=3, k=1, eps=1e-6), centered / std)


@pytest.mark.parametrize(("k", "match"), [(1, "2 <= k <= group_size = 3, got 1"), (4, "got 4")])
def test_sets_of_k_must_fit_a_group(k: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        group_best_margin(column(1, 2, 3), group_size=3, k=k)
    with pytest.raises(ValueError, match="1 <= k < group_size = 3, got 3"):
        group_best_normalized(column(1, 2, 3), group_size=3, k=3, eps=1e-6)


def test_greedy_centered() -> None:
    assert greedy_centered(column(1, 2, 3, 4), column(1, 5), group_size=2).tolist() == [0.0, 1.0, -2.0, -1.0]
    with pytest.raises(ValueError, match="a greedy score a prompt: 1 for 4 scores in groups of 2"):
        greedy_centered(column(1, 2, 3, 4), column(1), group_size=2)


def test_length_weighted_baseline() -> None:
    # (2 * 0 + 1 * 1 + 1 * 3) / 4 = 1
    weighted = length_weighted_centered(column(0, 1, 3), torch.tensor([2, 1, 1]), group_size=3)
    assert weighted.tolist() == [-1.0, 0.0, 2.0]


ESTIMATORS: list[Callable[..., Tensor]] = [
    group_centered,
    leave_one_out,
    lambda scores, group_size: group_best_margin(scores, group_size=group_size, k=2),
    lambda scores, group_size: group_best_normalized(scores, group_size=group_size, k=1, eps=1e-6),
    lambda scores, group_size: group_normalized(scores, group_size=group_size, eps=1e-6),
    lambda scores, group_size: length_weighted_centered(scores, torch.ones_like(scores).long(), group_size=group_size),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_has_no_baseline_is_refused(estimator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="a group of one has no baseline"):
        estimator(column(1, 2), group_size=1)
    with pytest.raises(ValueError, match="3 scores are not a multiple of 2"):
        estimator(column(1, 2, 3), group_size=2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"finite scores: those at \[1\]"):
            estimator(column(1, bad), group_size=2)


def test_process_supervision_of_a_group() -> None:
    """The steps are worth 1 and 0 in the first response, and 1 and 1 in the second.

    Mean 3/4, variance 3/4 / 3 = 1/4, so 1/2, -3/2 and twice 1/2. The first response has 5 sampled tokens behind 2 of
    the
    prompt, and steps end at the second and the last sampled token. The second response has 4 tokens, an observation
    behind the first token, and steps end at the first and the third token.
    """
    terms = steps_normalized(column(1.0, 0.0, 1.0, 1.0), eps=0.0)
    torch.testing.assert_close(terms, column(0.5, -1.5, 0.5, 0.5))
    torch.testing.assert_close(steps_centered(column(1.0, 0.0, 1.0, 1.0)), column(0.25, -0.75, 0.25, 0.25))
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1]).bool()
    rewards = torch.zeros(13, dtype=terms.dtype)
    rewards[[3, 6, 8, 11]] = terms
    found = reward_to_go(rewards, mask, torch.tensor([7, 6]), gamma=1.0)
    expected = column(0, 0, -1.0, -1.0, -1.5, -1.5, -1.5, 0, 1.0, 0, 0.5, 0.5, 0.0)
    torch.testing.assert_close(found, expected.to(found.dtype))


def test_one_step_a_response_is_a_score_and_one_step_alone_has_nothing_to_be_compared_with() -> None:
    scores = column(3.0, 1.0, 4.0, 1.5)
    assert torch.equal(steps_normalized(scores, eps=1e-6), group_normalized(scores, group_size=4, eps=1e-6))
    assert torch.equal(steps_centered(scores), group_centered(scores, group_size=4))
    for values in (column(2.0), column()):
        assert steps_normalized(values, eps=1e-6).tolist() == steps_centered(values).tolist() == [0.0] * len(values)
