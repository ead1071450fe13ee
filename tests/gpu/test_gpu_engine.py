"""DeepSpeed on a GPU: a single rank equals plain torch on a CPU, and its states leave the GPU and return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.engine.deepspeed import DeepSpeedEngine
from rlhf.models.packed.forward import policy_logprobs
from tests.gpu.gpu_helpers import GPU, on_one_rank
from tests.integration.engine_training import LENGTHS, OPTIMIZER, SCHEDULE, STEPS, batch, plain_training, tiny_model
from tests.integration.rank_gang import DEADLINE_S

pytestmark = pytest.mark.gpu


def loss_of(model: Any, sequences: list[Tensor]) -> Tensor:
    """Return the mean negative log-probability over the step's sampled tokens."""
    lengths = torch.tensor([len(s) for s in sequences], device=GPU)
    mask = torch.cat([torch.arange(len(s)) > 0 for s in sequences]).to(GPU)
    logprobs, _ = policy_logprobs(model, torch.cat(sequences).to(GPU), lengths, mask=mask)
    return -logprobs.float().sum() / (sum(LENGTHS) - len(LENGTHS))


def make_engine(stage: Any, dtype: torch.dtype, offload: frozenset[Any] = frozenset()) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        tiny_model(dtype),
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        zero_stage=stage,
        dtype=dtype,
        device=GPU,
        deadline_s=DEADLINE_S,
        offload=offload,
    )


def step(engine: DeepSpeedEngine, number: int) -> float:
    engine.backward(engine.forward(loss_of, batch(number)), last=True)
    return engine.step().grad_norm


def weights_of(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: weight.cpu().clone() for name, weight in engine.named_weights(torch.float32)}


def train(stage: int, dtype: torch.dtype, offload: frozenset[Any] = frozenset()) -> dict[str, Tensor]:
    engine = make_engine(stage, dtype, offload)
    for number in range(1, STEPS + 1):
        step(engine, number)
    weights = weights_of(engine)
    engine.close()
    return weights


def train_with_a_rest(stage: int, dtype: torch.dtype, offload: frozenset[Any]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the weights after three steps with offloads, and the bytes allocated around the first offload."""
    engine = make_engine(stage, dtype, offload)
    allocated = []
    for number in range(1, STEPS + 1):
        step(engine, number)
        torch._C._cuda_clearCublasWorkspaces()  # larger than the model, and no part of the model's state
        allocated.append(torch.cuda.memory_allocated())
        engine.offload_to_host()
        allocated.append(torch.cuda.memory_allocated())
        engine.reload_to_device()
        allocated.append(torch.cuda.memory_allocated())
    weights = weights_of(engine)
    engine.close()
    return weights, allocated


def states_taken_back(stage: int, offload: frozenset[Any], folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of all tensors, and of the tensors with different bits after another engine restored
    the states.
    """
    engine = make_engine(stage, torch.bfloat16, offload)
    engine.open_snapshots(folder)
    step(engine, 1)
    engine.take_snapshot(1)
    kept = weights_of(engine) | {name: tensor.cpu().clone() for name, tensor in engine._state.tensors().items()}
    step(engine, 2)  # step 2 waits for the copy
    engine.close()
    engine = make_engine(stage, torch.bfloat16, offload)
    engine.open_snapshots(folder)
    engine.restore_snapshot(1)
    found = weights_of(engine) | {name: tensor.cpu() for name, tensor in engine._state.tensors().items()}
    engine.close()
    return sorted(kept), [name for name in kept if not torch.equal(kept[name], found[name])]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float32_equals_plain_adamw_on_a_cpu(stage: int) -> None:
    found = on_one_rank(train, stage=stage, dtype=torch.float32)
    torch.testing.assert_close(found, plain_training(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [frozenset(), frozenset({"optimizer"})], ids=["on_gpu", "offload"])
def test_bfloat16_is_near_it(stage: int, offload: frozenset[Any]) -> None:
    found, expected = on_one_rank(train, stage=stage, dtype=torch.bfloat16, offload=offload), plain_training()
    start = {name: weight.detach() for name, weight in tiny_model().named_parameters()}
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert float(apart.norm() / moved.norm()) < 0.3  # near 0, Adam turns rounding of a gradient into whole steps


@pytest.mark.parametrize(
    ("dtype", "offload"),
    [(torch.float32, frozenset()), (torch.bfloat16, frozenset()), (torch.bfloat16, frozenset({"optimizer"}))],
    ids=["fp32", "bf16", "bf16_offload"],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_states_leave_the_gpu_and_come_back(stage: int, dtype: torch.dtype, offload: frozenset[Any]) -> None:
    weights, (before, during, after, *_) = on_one_rank(train_with_a_rest, stage=stage, dtype=dtype, offload=offload)
    assert during < 0.5 * before
    assert after > 0.8 * before
    expected = on_one_rank(train, stage=stage, dtype=dtype, offload=offload)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(weights, expected, **tolerance)


@pytest.mark.parametrize(("stage", "offload"), [(0, ()), (2, ()), (3, ()), (3, ("optimizer", "parameters"))])
def test_a_snapshot_has_the_bits_of_the_state_on_the_gpu(stage: int, offload: tuple[Any, ...], tmp_path: Path) -> None:
    names, differing = on_one_rank(states_taken_back, stage=stage, offload=frozenset(offload), folder=tmp_path)
    assert any(name.endswith("exp_avg_sq") for name in names)
    assert not differing
