"""Moving the engine's states to the host and back changes nothing, for every stage that DeepSpeed moves.

On a CPU no state changes place, but the bookkeeping is DeepSpeed's own; tests/gpu looks at the memory.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlhf.engine.deepspeed import DeepSpeedEngine
from tests.integration.engine_training import make_engine, train, weights_of
from tests.integration.rank_gang import Gang, Gangs

OPTIMIZER_ON_HOST: dict[str, Any] = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def train_with_a_rest(
    rank: int, world_size: int, *, stage: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights of a run of three steps, and of a run with states moved to the host between steps."""
    found = []
    for rests in (False, True):
        engine: Any = make_engine(stage, dtype)
        for step in range(1, 4):
            train(engine, rank, world_size, steps=range(step, step + 1), num_microbatches=1)
            if rests:
                engine.move_to_host()
                engine.move_to_device()
        found.append(weights_of(engine))
        engine.close()
    unbroken, rested = found
    return unbroken, rested


def states_put_aside(
    rank: int, world_size: int, *, stage: int
) -> tuple[set[str], dict[str, Tensor], dict[str, Tensor]]:
    """Return the names of states moved by DeepSpeed with the optimizer on the host, and the weights of a run with and
    without moves."""
    plain = DeepSpeedEngine._deepspeed_config

    def with_optimizer_on_host(engine: DeepSpeedEngine, *args: Any, **options: Any) -> dict[str, Any]:
        config = plain(engine, *args, **options)
        return config | {"zero_optimization": config["zero_optimization"] | OPTIMIZER_ON_HOST}

    moved: set[str] = set()
    weights = []
    with mock.patch.object(DeepSpeedEngine, "_deepspeed_config", with_optimizer_on_host):
        for rests in (False, True):
            engine: Any = make_engine(stage, torch.bfloat16, offload=frozenset({"optimizer"}))
            for step in range(1, 4):
                train(engine, rank, world_size, steps=range(step, step + 1), num_microbatches=1)
                if rests:
                    engine.move_to_host()
                    moved |= {state.value for state in engine._engine.optimizer.offloaded_states}
                    engine.move_to_device()
            weights.append(weights_of(engine))
            engine.close()
    return moved, weights[0], weights[1]


@pytest.fixture
def gang(gangs: Gangs) -> Gang:
    return gangs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_as_if_nothing_had_been_moved(gang: Gang, stage: int, dtype: torch.dtype) -> None:
    for unbroken, rested in gang.run(train_with_a_rest, stage=stage, dtype=dtype):
        assert all(torch.equal(unbroken[name], rested[name]) for name in unbroken)


@pytest.mark.parametrize("stage", [2, 3])
def test_states_of_an_offloaded_optimizer_stay_on_the_host(gang: Gang, stage: int) -> None:
    for moved, unbroken, rested in gang.run(states_put_aside, stage=stage):
        assert "lp_params" in moved
        assert not moved & {"hp_params", "optim_states"}  # reload_states would put them on the GPU
        assert stage == 2 or "lp_grads" not in moved  # stage 3 would put its block of gradients there too
        assert all(torch.equal(unbroken[name], rested[name]) for name in unbroken)
