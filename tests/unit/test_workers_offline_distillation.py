"""rlhf/workers/offline/distillation.py: the teacher's states reach the tokens of a rank's rows."""

from __future__ import annotations

import pytest
import torch

from rlhf.types import Examples, LearntStates, MinibatchPlan
from rlhf.workers.offline.distillation import DistillationWorker
from rlhf.workers.offline.offline_worker import OfflineBatch

ROWS = (5, 9, 5)  # row 5 has two tokens in the loss mask, and row 9 has one
BATCH = OfflineBatch(
    dataset=0,
    plan=MinibatchPlan(sequences_by_rank=(ROWS,), num_tokens=5, num_sequences=3),
    rows=ROWS,
    examples=Examples(
        sequence_ids=torch.tensor(ROWS),
        lengths=torch.tensor([3, 2, 3]),
        token_ids=torch.arange(8),
        loss_mask=torch.tensor([False, True, True, False, True, False, True, True]),
    ),
    microbatches=(),
)


def states(*rows: int) -> LearntStates:
    hidden = [[row + 0.1 * i] for row in rows for i in range(2 if row == 5 else 1)]
    lengths = torch.tensor([2 if row == 5 else 1 for row in rows])
    return LearntStates(sequence_ids=torch.tensor(rows), lengths=lengths, hidden=torch.tensor(hidden))


def test_a_repeated_row_has_its_states_each_time() -> None:
    hidden = object.__new__(DistillationWorker).shared(BATCH, [states(9), states(5)])
    torch.testing.assert_close(hidden, torch.tensor([[5.0], [5.1], [9.0], [5.0], [5.1]]))


def test_surplus_states_are_refused() -> None:
    with pytest.raises(ValueError, match="returned 9 states for 5 tokens"):
        object.__new__(DistillationWorker).shared(BATCH, [states(5, 9, 5)])
