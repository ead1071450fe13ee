"""Checkpoints of snapshots copy shared memory, and are read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.randomness import random_state, restore_random_state
from rlhf.engine.snapshot_checkpoint import is_of_snapshots, read_snapshot, write_snapshot
from rlhf.engine.snapshots import Snapshots
from rlhf.errors import UserError

RECORD = EngineRecord(
    model="m",
    ranks=2,
    zero_stage=2,
    dtype="float32",
    optimizer="adamw",
    groups=[{"w": 7}],
    frozen_weights="0",
    steps=3,
    updates_per_step=1,
)


def state(rank: int) -> dict[str, Tensor]:
    """The tensors of a rank with eleven masters."""
    masters = {f"master {i}": torch.full((7,), 100.0 * rank + i) for i in range(11)}
    return masters | {f"state {i} exp_avg": torch.full((7,), i, dtype=torch.bfloat16) for i in range(11)}


def kept(folder: Path) -> dict[str, Any]:
    """Keep steps 2 and 3 of two ranks in folders of their numbers. Returns the values of step 3."""
    values = {"states": {f"state {i}": {"step": i} for i in range(11)}, "counters": {"global_steps": 3}}
    for rank in range(2):
        snapshots = Snapshots(folder / str(rank), state(rank), deadline_s=60.0)
        for step in (2, 3):
            rest = {"random": random_state(), "steps": step, "record": RECORD.model_dump()}
            snapshots.take(step, state(rank), values | rest)
            torch.rand(1)
        snapshots.close()
    return values


def test_each_rank_finds_its_state_again(tmp_path: Path) -> None:
    values, checkpoint = kept(tmp_path), tmp_path / "policy"
    checkpoint.mkdir()
    assert not is_of_snapshots(checkpoint)
    for rank in range(2):
        write_snapshot(tmp_path / str(rank), 3, checkpoint, rank)
    assert is_of_snapshots(checkpoint)
    assert EngineRecord.read(checkpoint) == RECORD
    for rank in range(2):
        found = read_snapshot(checkpoint, rank)
        assert found.tensors.keys() == state(rank).keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state(rank).items())
        assert [float(master[0]) for master in found.masters] == [100.0 * rank + i for i in range(11)]
        states = [(own["step"], float(own["exp_avg"][0]), len(own)) for own in found.states]
        assert states == [(i, float(i), 2) for i in range(11)]
        assert found.values["counters"] == values["counters"]
        restore_random_state(torch.load(checkpoint / f"random_{rank:05d}.pt", weights_only=True))


def test_a_step_that_is_not_kept_and_a_snapshot_that_is_cut_are_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    (tmp_path / "policy").mkdir()
    with pytest.raises(OSError, match=r"1\.pt"):
        write_snapshot(tmp_path / "0", 1, tmp_path / "policy", 0)
    write_snapshot(tmp_path / "0", 3, tmp_path / "policy", 0)
    os.truncate(tmp_path / "policy" / "snapshots" / "00000.slot", 64)
    with pytest.raises(UserError, match=r"00000\.slot does not hold the state of a rank"):
        read_snapshot(tmp_path / "policy", 0)
