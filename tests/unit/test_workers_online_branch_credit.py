"""Step rewards of branches, at the tokens of their trunks."""

from __future__ import annotations

import torch

from rlhf.workers.online.branch_credit import with_branch_rewards
from tests.fixtures.workers import rollouts_of


def test_a_branch_of_a_branch_credits_both_trunks() -> None:
    rollouts = rollouts_of((0, [1, 2, 3], [1, 2]), (0, [1, 2, 4, 5], [3]), (0, [1, 2, 4, 5, 6], [4]))
    rewards = torch.tensor([0.0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 4])
    # the last row passes 4 to the second row's token, which passes 2 + 4 to the first row's first sampled token
    assert with_branch_rewards(rewards, rollouts).tolist() == [0, 6, 1, 0, 0, 0, 6, 0, 0, 0, 0, 4]


def test_a_branch_off_unsampled_tokens_of_a_branch_credits_the_trunk_of_its_trunk() -> None:
    rollouts = rollouts_of((0, [1, 2, 3], [1, 2]), (0, [1, 2, 4, 5], [3]), (0, [1, 2, 4, 7], [3]))
    rewards = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3])
    assert with_branch_rewards(rewards, rollouts).tolist() == [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 3]


def test_other_samples_and_shared_prompts_get_nothing() -> None:
    rollouts = rollouts_of((0, [1, 2], [1]), (1, [1, 2, 3], [2]), (2, [1, 5], [1]), (2, [1, 6], [1]))
    rewards = torch.tensor([0.0, 0, 0, 0, 2, 0, 0, 0, 3])
    assert with_branch_rewards(rewards, rollouts).tolist() == rewards.tolist()
