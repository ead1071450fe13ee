"""Moving the engine's states to the host and back changes nothing, for every stage that DeepSpeed moves.

On a CPU no state changes place, but the bookkeeping is DeepSpeed's own; tests/gpu looks at the memory.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlhf.engine.deepspeed import DeepSpeedEngine, Offload
from tests.integration.engine_training import make_engine, train, weights_of
from tests.integration.rank_gang import Gangs

OPTIMIZER_ON_HOST: dict[str, Any] = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def train_with_moves(
    rank: int, world_size: int, *, stage: int, dtype: torch.dtype, on_host: bool
) -> tuple[set[str], dict[str, Tensor], dict[str, Tensor]]:
    """Return the states moved by DeepSpeed between steps, and the weights of runs without and with moves.

    on_host: the optimizer is on the host.
    """
    plain = DeepSpeedEngine._deepspeed_config

    def with_optimizer_on_host(engine: DeepSpeedEngine, *args: Any, **options: Any) -> dict[str, Any]:
        config = plain(engine, *args, **options)
        return config | {"zero_optimization": config["zero_optimization"] | (OPTIMIZER_ON_HOST if on_host else {})}

    moved: set[str] = set()
    weights = []
    offload: Offload = frozenset({"optimizer"} if on_host else ())
    with mock.patch.object(DeepSpeedEngine, "_deepspeed_config", with_optimizer_on_host):
        for moves in (False, True):
            engine: Any = make_engine(stage, dtype, offload=offload)
            for step in range(1, 4):
                train(engine, rank, world_size, steps=range(step, step + 1), num_microbatches=1)
                if moves:
                    engine.move_to_host()
                    moved |= {state.value for state in engine._engine.optimizer.offloaded_states}
                    engine.move_to_device()
            weights.append(weights_of(engine))
            engine.close()
    return moved, weights[0], weights[1]


@pytest.mark.parametrize(
    ("dtype", "on_host"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["fp32", "bf16", "optimizer on host"],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_as_if_nothing_had_been_moved(
    gangs: Gangs, stage: int, dtype: torch.dtype, on_host: bool
) -> None:
    for moved, unbroken, rested in gangs[1].run(train_with_moves, stage=stage, dtype=dtype, on_host=on_host):
        assert all(torch.equal(unbroken[name], rested[name]) for name in unbroken)
        assert "lp_params" in moved
        if on_host:
            assert not moved & {"hp_params", "optim_states"}  # reload_states would put these states on the GPU
            assert stage == 2 or "lp_grads" not in moved  # stage 3 would put the block of gradients on the GPU too
