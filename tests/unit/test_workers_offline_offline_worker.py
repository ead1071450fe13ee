"""For every order of the plan, the rows of a micro-batch keep tokens, margins and labels."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.models.packed.row_layout import RowLayout
from rlhf.types import Examples, MinibatchPlan, Pairs, TokenValues
from rlhf.workers.offline.offline_worker import PairsWorker

ROWS = 9


class Worker(PairsWorker):
    """A worker without a model or ranks."""

    def __init__(self, pairs: Pairs, *, budget: int) -> None:
        self.data_rank = 1
        self.config: Any = SimpleNamespace(train=SimpleNamespace(max_tokens_per_microbatch=budget))
        self.engine: Any = SimpleNamespace(max_over_ranks=lambda count: max(count, 3))
        self.layout = RowLayout.SHARED_PROMPTS
        self.load_data(pairs)
        values = pairs.examples.token_ids.float()
        self.references[0] = TokenValues(
            sequence_ids=pairs.examples.sequence_ids, lengths=pairs.examples.lengths, values=values
        )

    def loss(self, *_: Any) -> Any:
        raise AssertionError("it has no loss")


def some_pairs(draw: random.Random, *, sides: int) -> Pairs:
    """Return pairs whose tokens name row, sequence and place; a row's sequences begin with the same two tokens."""
    sequences = []
    for row in range(ROWS):
        for side in range(sides):
            own = [1000 * row + 100 * (side + 1) + i for i in range(draw.randint(1, 6))]
            sequences.append([1000 * row, 1000 * row + 1, *own])
    tokens = [token for sequence in sequences for token in sequence]
    return Pairs(
        examples=Examples(
            sequence_ids=torch.arange(len(sequences)),
            lengths=torch.tensor([len(sequence) for sequence in sequences]),
            token_ids=torch.tensor(tokens),
            loss_mask=torch.tensor([token % 1000 >= 100 for token in tokens]),
        ),
        prompt_tokens=torch.full((ROWS,), 2),
        margins=torch.arange(ROWS).float(),
        labels=torch.arange(ROWS) % 2 == 0,
    )


@pytest.mark.parametrize("sides", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_rows_in_any_order_and_twice_keep_what_is_theirs(sides: int, seed: int) -> None:
    draw = random.Random(seed)
    pairs = some_pairs(draw, sides=sides)
    rows = tuple(draw.choices(range(ROWS), k=7))
    batch = Worker(pairs, budget=draw.choice([24, 40, 500])).batch(
        0, MinibatchPlan(sequences_by_rank=((8,), rows), num_tokens=1, num_sequences=8)
    )
    assert batch.num_sides == pairs.num_sides == sides
    assert batch.reference is not None
    seen = []
    for microbatch in batch.microbatches:
        if not microbatch.rows:
            continue
        examples = batch.examples
        whole = examples.token_ids[microbatch.tokens].split(microbatch.lengths.tolist())
        reference = batch.reference.values[microbatch.tokens].split(microbatch.lengths.tolist())
        for index, place in enumerate(batch.places(microbatch)):
            row = batch.rows[place]
            seen.append(row)
            assert batch.margins[place] == row
            assert bool(batch.labels[place]) == (row % 2 == 0)
            for side in range(sides):
                tokens = whole[index * sides + side].tolist()
                kept = tokens if side == 0 else [1000 * row, 1000 * row + 1, *tokens]
                wanted = pairs.examples.take([sides * row + side]).token_ids.tolist()
                assert kept == wanted
                assert reference[index * sides + side].tolist() == tokens
    assert sorted(seen) == sorted(rows)


def test_a_rank_without_rows_has_micro_batches_like_the_others() -> None:
    worker = Worker(some_pairs(random.Random(0), sides=3), budget=500)
    batch = worker.batch(0, MinibatchPlan(sequences_by_rank=((1, 2), ()), num_tokens=1, num_sequences=2))
    assert [microbatch.rows for microbatch in batch.microbatches] == [(), (), ()]
    assert [batch.places(microbatch) for microbatch in batch.microbatches] == [[], [], []]
    assert all(not batch.examples.loss_mask[microbatch.tokens].any() for microbatch in batch.microbatches)
