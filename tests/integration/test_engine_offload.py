"""Putting the engine's states aside and taking them back changes nothing, for every stage that DeepSpeed moves.

On a CPU nothing changes its place, but the bookkeeping is DeepSpeed's own; tests/gpu looks at the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.test_engine_deepspeed import Gang, make_engine, train, weights_of


def train_with_a_rest(
    rank: int, world_size: int, *, stage: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a run of three steps, and of one whose states were put aside between its steps."""
    found = []
    for rests in (False, True):
        engine: Any = make_engine(stage, dtype)
        for step in range(1, 4):
            train(engine, rank, world_size, steps=range(step, step + 1), num_microbatches=1)
            if rests:
                engine.put_aside()
                engine.take_back()
        found.append(weights_of(engine))
        engine.close()
    unbroken, rested = found
    return unbroken, rested


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang(1)
    yield gang
    gang.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_as_if_nothing_had_been_moved(gang: Gang, stage: int, dtype: torch.dtype) -> None:
    for unbroken, rested in gang.run(train_with_a_rest, stage=stage, dtype=dtype):
        assert all(torch.equal(unbroken[name], rested[name]) for name in unbroken)
