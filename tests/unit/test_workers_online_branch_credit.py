"""Step rewards of branches, at the tokens of their trunks."""

from __future__ import annotations

import torch

from rlhf.types import Rollouts
from rlhf.workers.online.branch_credit import with_branch_rewards


def batch(*rows: tuple[int, list[int], list[int]]) -> Rollouts:
    """Rows of a sample's id, tokens, and positions of the sampled tokens."""
    masks = [[place in sampled for place in range(len(ids))] for _, ids, sampled in rows]
    total = sum(len(ids) for _, ids, _ in rows)
    return Rollouts(
        sequence_ids=torch.tensor([sample for sample, _, _ in rows]),
        lengths=torch.tensor([len(ids) for _, ids, _ in rows]),
        token_ids=torch.tensor([token for _, ids, _ in rows for token in ids]),
        response_mask=torch.tensor([value for mask in masks for value in mask]),
        rollout_logprobs=torch.zeros(total),
        versions=torch.zeros(total, dtype=torch.int64),
    )


def test_a_branch_of_a_branch_credits_both_trunks() -> None:
    rollouts = batch((0, [1, 2, 3], [1, 2]), (0, [1, 2, 4, 5], [3]), (0, [1, 2, 4, 5, 6], [4]))
    rewards = torch.tensor([0.0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 4])
    # the last row passes 4 to the second row's token, which passes 2 + 4 to the first row's first sampled token
    assert with_branch_rewards(rewards, rollouts).tolist() == [0, 6, 1, 0, 0, 0, 6, 0, 0, 0, 0, 4]


def test_a_branch_off_unsampled_tokens_of_a_branch_credits_the_trunk_of_its_trunk() -> None:
    rollouts = batch((0, [1, 2, 3], [1, 2]), (0, [1, 2, 4, 5], [3]), (0, [1, 2, 4, 7], [3]))
    rewards = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3])
    assert with_branch_rewards(rewards, rollouts).tolist() == [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 3]


def test_other_samples_and_shared_prompts_get_nothing() -> None:
    rollouts = batch((0, [1, 2], [1]), (1, [1, 2, 3], [2]), (2, [1, 5], [1]), (2, [1, 6], [1]))
    rewards = torch.tensor([0.0, 0, 0, 0, 2, 0, 0, 0, 3])
    assert with_branch_rewards(rewards, rollouts).tolist() == rewards.tolist()
