"""The optimal token baseline, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.objectives.token_baseline import realized_energy, step_baseline


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
    baseline, alone = step_baseline(
        column(1, 5, 4, 7),
        column(1, 3, 2, 9),
        torch.tensor([True, True, True, False]),
        torch.tensor([0, 1, 0, 0]),
        eps=0.0,
    )
    assert baseline.tolist() == [3.0, 5.0, 3.0, 0.0]  # (1 * 1 + 2 * 4) / 3; its own; masked
    assert alone.tolist() == [False, True, False, False]
