"""Two ranks are killed, the second in the middle of a snapshot, and two successors repeat the step with the same bits.

The successors use the older snapshot, since only that snapshot is complete on both ranks. The test compares weights,
optimizer states, norms and random states. Dropout makes the random states count, and ZeRO-3 shards the largest weight.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf.engine.deepspeed import DeepSpeedEngine
from rlhf.engine.rank_files import write_snapshot
from rlhf.engine.training_engine import OptimizerName, OptimizerSettings, ScheduleSettings
from rlhf.errors import RunError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.packed.forward import policy_logprobs
from tests.integration.rank_gang import DEADLINE_S, Gang, engine_of, small_config

SCHEDULE = ScheduleSettings(kind="linear", warmup_steps=2, total_steps=6)
LENGTHS = torch.tensor([5, 3])
MASK = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
LAST, KILLED_IN = 4, 3  # steps

KINDS: dict[str, dict[str, Any]] = {
    "zero 0": {"stage": 0},
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3},
    "lora": {"stage": 2, "adapter": {}},
    "lora, zero 0": {"stage": 0, "adapter": {}},
    "pissa, zero 3": {"stage": 3, "adapter": {"init": "pissa"}},
    **{f"bfloat16, zero {stage}": {"stage": stage, "dtype": torch.bfloat16} for stage in (0, 1, 2, 3)},
    "muon": {"stage": 0, "optimizer": "muon"},
    "adafactor": {"stage": 0, "optimizer": "adafactor"},
    **{f"adamw_8bit, zero {stage}": {"stage": stage, "optimizer": "adamw_8bit"} for stage in (0, 2, 3)},
}
IN_SHORT = ("zero 0", "zero 2", "zero 3", "lora")


class WithDropout(torch.nn.Module):
    """Noise on the embedding, drawn as dropout is."""

    def forward(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.nn.functional.dropout(output, 0.1) if torch.is_grad_enabled() else output


# What a rank does. Each of these runs in the processes of a gang.


def started(
    rank: int,
    *,
    stage: int,
    dtype: torch.dtype = torch.float32,
    adapter: Mapping[str, Any] | None = None,
    optimizer: OptimizerName = "adamw",
) -> DeepSpeedEngine:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(small_config(vocab_size=4096)).to(dtype).train()
    if adapter is not None:
        model = add_lora(model, rank=4, alpha=8.0, dropout=0.0, **adapter)
    model.get_input_embeddings().register_forward_hook(WithDropout().forward)
    torch.manual_seed(rank)
    settings = OptimizerSettings(name=optimizer, lr=0.01, weight_decay=0.1, grad_clip=0.5)
    return engine_of(model, stage=stage, dtype=dtype, optimizer=settings, schedule=SCHEDULE)


def loss_of(model: Any, rank: int, step: int) -> Tensor:
    tokens = torch.arange(rank + step, rank + step + 16, 2)
    return -policy_logprobs(model, tokens, LENGTHS, mask=MASK)[0].sum() / 12


def updated(engine: DeepSpeedEngine, rank: int, step: int) -> tuple[float, float]:
    engine.backward(engine.forward(loss_of, rank, step), last=True)
    report = engine.step()
    return report.grad_norm, report.lr


def everything(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return copies of all tensors of the rank, the weights in use, and the next random numbers."""
    state = {name: tensor.clone() for name, tensor in engine._state.tensors().items()}
    weights = {name: weight.clone() for name, weight in engine.named_weights(torch.float32)}
    assert any(name.startswith("state ") for name in state), "the optimizer has no states"
    return {**state, **weights, "drawn": torch.rand(4)}


def train_unbroken(rank: int, world_size: int, *, kind: str) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    engine = started(rank, **KINDS[kind])
    reports = [updated(engine, rank, step) for step in range(1, LAST + 1)]
    state = everything(engine)
    engine.close()
    return state, reports[KILLED_IN - 1 :]


def train_and_keep(rank: int, world_size: int, *, kind: str, folder: Path, last: int = KILLED_IN) -> int:
    """Train with snapshots. The last rank never ends the copy of step 3. Returns the process to be killed."""
    engine = started(rank, **KINDS[kind])
    engine.open_snapshots(folder / str(rank))
    assert engine.newest_snapshot() is None
    engine.take_snapshot(0)
    is_half = last == KILLED_IN and rank == world_size - 1
    for step in range(1, last + 1):
        updated(engine, rank, step)
        if step == KILLED_IN and is_half:
            stop_in_the_middle(engine)
        engine.take_snapshot(step)
    if not is_half:
        assert engine.newest_snapshot() == last
    if last < KILLED_IN:
        engine.close()
    return os.getpid()


def stop_in_the_middle(engine: DeepSpeedEngine) -> None:
    assert engine._snapshots is not None
    whole: Callable[..., Path] = engine._snapshots._copy

    def half(step: int, tensors: list[Tensor], content: dict[str, Any], ready: None) -> Path:
        junk = [torch.full_like(tensor, 7) for tensor in tensors]
        with pytest.raises(RunError):  # the slot is overwritten, but not yet described
            whole(None, junk, content | {"values": threading.Lock()}, ready)
        threading.Event().wait(DEADLINE_S)
        raise AssertionError("the process was not killed")

    engine._snapshots._copy = half  # type: ignore[method-assign]


def restore(
    rank: int, world_size: int, *, kind: str, folder: Path, is_checkpoint: bool = False
) -> tuple[dict[str, Tensor], list[tuple[float, float]], int | None]:
    """Return the results of repeating later steps, and the newest step of the predecessor's snapshots."""
    engine, newest, reports = started(rank + 10, **KINDS[kind]), None, []
    if is_checkpoint:
        engine.load(folder)
    else:
        engine.open_snapshots(folder / str(rank))
        newest = engine.newest_snapshot()
        engine.restore_snapshot(KILLED_IN - 1)
    for step in range(KILLED_IN, LAST + 1):
        reports.append(updated(engine, rank, step))
        if not is_checkpoint:
            engine.take_snapshot(step)
    state = everything(engine)
    engine.close()
    return state, reports, newest


def assert_same_bits(kind: str, unbroken: list[Any], results: list[Any]) -> None:
    for (state, reports), (again, reports_again, _) in zip(unbroken, results, strict=True):
        assert reports == reports_again, kind
        assert state.keys() == again.keys()
        differing = [name for name in state if not torch.equal(state[name], again[name])]
        assert not differing, f"{kind}: {differing}"


def kill_and_compare(kinds: tuple[str, ...], successors: Gang, folder: Path) -> None:
    gang = Gang(2)
    unbroken = {kind: gang.run(train_unbroken, kind=kind) for kind in kinds}
    for kind in kinds:
        pids = gang.run(train_and_keep, kind=kind, folder=folder / kind)
    for pid, process in zip(pids, gang.processes, strict=True):
        os.kill(pid, signal.SIGKILL)
        process.join(DEADLINE_S)
        assert process.exitcode == -signal.SIGKILL
    for kind in kinds:
        results = successors.run(restore, kind=kind, folder=folder / kind)
        assert [newest for _, _, newest in results] == [KILLED_IN, KILLED_IN - 1]
        assert_same_bits(kind, unbroken[kind], results)


def test_a_killed_gang_goes_on_with_the_same_bits(gang: Gang, tmp_path: Path) -> None:
    kill_and_compare(IN_SHORT, gang, tmp_path)


@pytest.mark.slow
def test_every_kind_of_state_is_restored(gang: Gang, tmp_path: Path) -> None:
    kill_and_compare(tuple(kind for kind in KINDS if kind not in IN_SHORT), gang, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_made_of_snapshots_is_resumed_with_the_same_bits(gang: Gang, tmp_path: Path) -> None:
    for kind in KINDS:
        unbroken = gang.run(train_unbroken, kind=kind)
        gang.run(train_and_keep, kind=kind, folder=tmp_path / kind, last=KILLED_IN - 1)
        checkpoint = tmp_path / f"{kind}, checkpoint"
        checkpoint.mkdir()
        for rank in range(2):
            write_snapshot(tmp_path / kind / str(rank), KILLED_IN - 1, checkpoint, rank)
        assert_same_bits(kind, unbroken, gang.run(restore, kind=kind, folder=checkpoint, is_checkpoint=True))
