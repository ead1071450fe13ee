"""rlhf/workers/offline/pairs.py: the numbers of a policy's sequences, with given log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf.models.packed.row_layout import RowLayout
from rlhf.types import Examples, MinibatchPlan, Pairs
from rlhf.workers.microbatches import Microbatch
from rlhf.workers.offline.pairs import PreferenceWorker

PAIRS = Pairs(
    examples=Examples(
        sequence_ids=torch.arange(2),
        lengths=torch.tensor([2, 3]),
        token_ids=torch.tensor([7, 1, 7, 2, 4]),
        loss_mask=torch.tensor([False, True, False, True, True]),
    ),
    prompt_tokens=torch.tensor([1]),
    margins=torch.zeros(1),
    labels=torch.tensor([True]),
)


class Worker(PreferenceWorker):
    """A rank whose model takes single sequences, and gives token t the log-probability -t."""

    def __init__(self, *, length_alpha: float) -> None:
        self.data_rank, self.device, self.layout = 0, torch.device("cpu"), RowLayout.ONE_BY_ONE
        self.config: Any = SimpleNamespace(train=SimpleNamespace(max_tokens_per_microbatch=10))
        self.algorithm: Any = SimpleNamespace(wpo=False, length_alpha=length_alpha)
        self.engine: Any = SimpleNamespace(max_over_ranks=lambda count: 2)  # another rank has two pairs
        self.load_data(PAIRS)

    def logprobs(self, examples: Examples, microbatch: Microbatch) -> Tensor:
        return -self.part(examples.token_ids, microbatch).float()


def test_surplus_tokens_weigh_less_and_an_empty_micro_batch_has_zeros() -> None:
    worker = Worker(length_alpha=0.5)
    batch = worker.batch(0, MinibatchPlan(sequences_by_rank=((0,), (0, 0)), num_tokens=3, num_sequences=3))
    values = [worker.numbers(batch, microbatch).values.tolist() for microbatch in batch.microbatches]
    assert values == [[-1.0, -4.0], [0.0, 0.0]]  # -1; -2 - 0.5 * 4
