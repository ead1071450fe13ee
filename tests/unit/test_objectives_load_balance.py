"""The balance loss of experts, by hand."""

from __future__ import annotations

import torch

from rlhf.objectives.load_balance import balance_loss


def test_by_hand() -> None:
    # Two experts, one choice of each of 4 tokens: 3 and 1. Mean scores 0.7 and 0.3.
    # 2 * (0.75 * 0.7 + 0.25 * 0.3) = 2 * 0.6 = 1.2
    loss = balance_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.8, 1.2]]))
    torch.testing.assert_close(loss, torch.tensor([1.2]))
    even = balance_loss(torch.full((1, 4), 5.0), torch.tensor([[9.0, 1.0, 0.0, 0.0]]))  # whatever the scores
    torch.testing.assert_close(even, torch.ones(1))
