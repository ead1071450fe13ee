"""The files of ranks in a checkpoint, from a state and from snapshots in shared memory, are read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.randomness import random_state, restore_random_state
from rlhf.engine.rank_files import read_own, read_rank, write_rank, write_snapshot
from rlhf.engine.rank_state import Field, Sharing
from rlhf.engine.snapshots import Snapshots
from rlhf.errors import RunError, UserError

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
    """The tensors of a rank with eleven masters, and a copy that all ranks have."""
    masters = {f"master {i}": torch.full((7,), 100.0 * rank + i) for i in range(11)}
    states = {f"state {i} exp_avg": torch.full((7,), i, dtype=torch.bfloat16) for i in range(11)}
    return masters | states | {"initial w": torch.ones(3)}


def values(stage: int = 2) -> dict[str, Any]:
    states = {f"state {i}": {"step": i} for i in range(11)}
    record = RECORD.model_copy(update={"zero_stage": stage}).model_dump()
    return {"states": states, "counters": {"global_steps": 3}, "period": 2, "random": random_state(), "record": record}


def kept(folder: Path) -> None:
    """Keep steps 2 and 3 of two ranks in folders of their numbers."""
    for rank in range(2):
        snapshots = Snapshots(folder / str(rank), state(rank), deadline_s=60.0)
        for step in (2, 3):
            snapshots.take(step, state(rank), values())
            torch.rand(1)
        snapshots.close()


@pytest.mark.parametrize("of_snapshots", [False, True])
def test_each_rank_finds_its_state_again(tmp_path: Path, of_snapshots: bool) -> None:
    checkpoint = tmp_path / "policy"
    checkpoint.mkdir()
    kept(tmp_path)
    for rank in range(2):
        if of_snapshots:
            write_snapshot(tmp_path / str(rank), 3, checkpoint, rank)
        else:
            write_rank(checkpoint, rank, state(rank), values())
    assert EngineRecord.read(checkpoint) == RECORD
    for rank in range(2):
        found, wanted = read_rank(checkpoint, rank), state(rank)
        if rank == 1:
            del wanted["initial w"]  # below stage 3 rank 0 writes for all
        assert found.tensors.keys() == wanted.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.items())
        of_all_ranks = () if rank == 1 else ("counters", "period")
        assert found.values == {key: values()[key] for key in ("states", *of_all_ranks)}


def test_a_field_without_a_rule_is_refused(tmp_path: Path) -> None:
    """A field that no rule divides would reach a snapshot, but no checkpoint."""
    for tensors, added in (({"average 0": torch.ones(1)}, {}), ({}, {"average": 1})):
        with pytest.raises(RunError, match=r"average is not a field of a rank's state.*FIELDS in rlhf/engine/rank_st"):
            write_rank(tmp_path, 0, state(0) | tensors, values() | added)
    with pytest.raises(ValueError, match=r"Sharing\.SAME has no rule for tensors"):
        Field(Sharing.SAME, lambda state: {})
    with pytest.raises(ValueError, match=r"Sharing\.DIVIDED has no rule for values"):
        Field(Sharing.DIVIDED, lambda state: 0, lambda state, value: None)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_at_stage_0_only_the_first_rank_writes_the_state(tmp_path: Path, stage: int, ranks: int) -> None:
    for rank in range(2):
        write_rank(tmp_path, rank, state(rank), values(stage))
    assert len(list(tmp_path.glob("state_*"))) == ranks
    assert len(list(tmp_path.glob("random_*"))) == 2
    if stage == 3:
        assert "initial w" in read_rank(tmp_path, 1).tensors


def test_random_states_continue(tmp_path: Path) -> None:
    write_rank(tmp_path, 1, state(1), values())
    drawn = torch.rand(3)
    restore_random_state(read_own(tmp_path, "random", 1))
    assert torch.equal(torch.rand(3), drawn)
    path = tmp_path / "random_00001.json"
    for text in ("", "[1]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{path} cannot be read"):
            read_own(tmp_path, "random", 1)


def test_a_step_that_is_not_kept_and_a_snapshot_that_is_cut_are_refused(tmp_path: Path) -> None:
    """OSError lets the driver read the copy on another node instead."""
    kept(tmp_path)
    with pytest.raises(OSError, match=r"1\.json"):
        write_snapshot(tmp_path / "0", 1, tmp_path, 0)
    slot = json.loads((tmp_path / "0" / "3.json").read_bytes())["slot"]
    os.truncate(tmp_path / "0" / f"slot_{slot}", 64)
    with pytest.raises(OSError, match=rf"slot_{slot} does not hold the snapshot of step 3"):
        write_snapshot(tmp_path / "0", 3, tmp_path, 0)
