"""Token rewards, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.objectives.rewards import overlong_penalty, step_rewards, token_rewards

MASK, LENGTHS = torch.tensor([False, True, True, False, False, True]), torch.tensor([4, 2])


def test_the_score_stands_on_the_last_sampled_token() -> None:
    kl = torch.tensor([math.nan, 1.0, 2.0, math.nan, math.nan, -3.0])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, MASK, LENGTHS, kl_coef=0.5)
    assert rewards.tolist() == [0.0, -0.5, 9.0, 0.0, 0.0, 21.5]  # 10 - 0.5 * 2, 20 - 0.5 * -3
    with pytest.raises(ValueError, match=r"sequences \[1\] have no sampled token"):
        token_rewards(torch.zeros(3), torch.zeros(6), MASK, torch.tensor([3, 2, 1]), kl_coef=0.0)


def test_a_buffer_may_be_a_fraction() -> None:
    halves = overlong_penalty(torch.tensor([17, 18, 20, 25]), max_tokens=20, buffer=2.5)
    assert halves.tolist() == pytest.approx([0.0, -0.2, -1.0, -1.0])  # from 17.5 on: (18 - 17.5) / 2.5


def test_a_step_is_rewarded_where_it_ends() -> None:
    found = step_rewards(torch.tensor([5, 1, 5]), torch.tensor([1.0, -2.0, 0.5]), MASK)
    assert found.tolist() == [0.0, -2.0, 0.0, 0.0, 0.0, 1.5]
    with pytest.raises(ValueError, match=r"steps end at \[3\], where no token was sampled"):
        step_rewards(torch.tensor([3]), torch.tensor([1.0]), MASK)
