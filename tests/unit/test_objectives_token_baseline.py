"""The optimal token baseline, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.token_baseline import realized_energy, step_baseline, step_cells, step_sums


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_realized_energy() -> None:
    # p 0.5 and sum of squares 0.3: 1 - 1 + 0.3 = 0.3; p 0.2 and 0.4: 1 - 0.4 + 0.4 = 1; then the next sequence
    mask, lengths = torch.tensor([True, False, True, True]), torch.tensor([3, 1])
    logprobs, collision = column(0.5, 0.9, 0.2, 0.5).log(), column(0.3, 0.9, 0.4, 0.3).log()
    energy = realized_energy(logprobs, collision, mask, lengths)
    torch.testing.assert_close(energy[mask].tolist(), [0.3, 1.3, 0.3])
    weighted = realized_energy(logprobs, collision, mask, lengths, rollout_weights=column(2, 9, 1, 0.5))
    torch.testing.assert_close(weighted[mask].tolist(), [1.2, 2.2, 0.075])  # 0.3 * 4, + 1 * 1, 0.3 * 0.25


def test_step_baseline() -> None:
    # two sequences of 2 and 1 tokens: cell 0 has returns 1 and 4 with energies 1 and 2, cell 1 one token
    mask, cells = torch.tensor([True, True, True, False]), torch.tensor([0, 1, 0, 0])
    sums = step_sums(column(1, 5, 4, 7), column(1, 3, 2, 9), mask, cells, num_cells=2)
    assert sums.tolist() == [[9.0, 15.0], [3.0, 3.0], [2.0, 1.0]]
    baseline, alone = step_baseline(sums, mask, cells, eps=0.0)
    assert baseline.tolist() == [3.0, 5.0, 3.0, 0.0]  # (1 * 1 + 2 * 4) / 3; its own; masked
    assert alone.tolist() == [False, True, False, False]


def test_a_cell_is_a_group_s_step_counted_over_sampled_tokens() -> None:
    # two sequences of group 1 (a prompt token, a sampled one, a tool's, a sampled one; and two sampled), one of group 0
    mask = torch.tensor([False, True, False, True, False, True, True, False, True])
    cells = step_cells(mask, torch.tensor([4, 3, 2]), torch.tensor([1, 1, 0]), max_steps=2)
    assert cells[mask].tolist() == [2, 3, 2, 3, 0]
    assert int(cells.max()) < 4


def test_sums_of_parts_of_a_group_add_up() -> None:
    torch.manual_seed(0)
    returns, energy = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    mask, cells = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool), torch.tensor([0, 1, 1, 0, 1, 2])
    whole = step_sums(returns, energy, mask, cells, num_cells=3)
    parts = [
        step_sums(returns[rows], energy[rows], mask[rows], cells[rows], num_cells=3)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)
