"""The state of all ranks, sharded again for other ranks and another ZeRO stage, equals a division of the whole.

The record of an engine tells the place in the schedule, and a restored state spreads the float32 weights.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.partitions import Sharding, partitions_of
from rlhf.engine.rank_files import RankFile, write_rank
from rlhf.engine.rank_state import RankState
from rlhf.engine.resharding import copy_elements, copy_shared, overlaps_of, take_over
from rlhf.errors import UserError

SIZES = [{"embedding": 30, "up": 12, "down": 7}, {"norm": 3, "bias": 1}]  # with and without weight decay
REGROUPED = [{"norm": 3, "embedding": 30, "up": 12}, {"down": 7}, {"bias": 1}]
SHARDINGS = [Sharding(ranks=ranks, zero_stage=stage) for stage in range(4) for ranks in (1, 2, 3, 4, 7)]


def values(key: str, name: str) -> Tensor:
    """Return a different number for every element, and never the padding's number."""
    numel = next(group[name] for group in SIZES if name in group)
    start = 1000 * (1 + ["embedding", "up", "down", "norm", "bias"].index(name))
    return torch.arange(start, start + numel) + {"master": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}[key]


def divided(key: str, groups: list[dict[str, int]], sharding: Sharding, rank: int) -> list[Tensor]:
    """Return the masters of a rank, or the states of masters, with 0 in the padding."""
    ranks = sharding.ranks
    masters = []
    for group in groups:
        whole = [values(key, name) for name in group]
        if sharding.zero_stage == 0:
            masters += whole
        elif sharding.zero_stage == 3:
            parts = [pad(flat, (0, -len(flat) % ranks)).chunk(ranks)[rank] for flat in whole]
            masters.append(torch.cat(parts))
        else:
            flat = torch.cat(whole)
            masters.append(pad(flat, (0, -len(flat) % (2 * ranks))).chunk(ranks)[rank].clone())
    return masters


def file_of(groups: list[dict[str, int]], sharding: Sharding, rank: int) -> RankFile:
    tensors = {f"master {i}": master for i, master in enumerate(divided("master", groups, sharding, rank))}
    states: dict[str, Any] = {f"state {i}": {} for i in range(len(tensors))}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"state {i} {key}": value for i, value in enumerate(divided(key, groups, sharding, rank))}
    tensors |= {f"{state} step": torch.tensor(7.0) for state in states}
    return RankFile(tensors=tensors, values={"states": states})


def empty_state(groups: list[dict[str, int]], sharding: Sharding, rank: int) -> Any:
    """Like RankState of a new engine."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in file_of(groups, sharding, rank).tensors.items()}
    masters = [tensor for name, tensor in empty.items() if name.startswith("master")]
    return SimpleNamespace(masters=lambda: masters, tensors=lambda: empty, copies=dict)


def test_at_stage_3_a_large_group_is_cut_into_masters() -> None:
    groups = [{"a": 6, "b": 2, "c": 3}, {"d": 1}]
    with mock.patch("rlhf.engine.partitions.SUB_GROUP_ELEMENTS", 4):
        partitions = partitions_of(groups, Sharding(ranks=2, zero_stage=3))
    assert [partition.sizes for partition in partitions] == [(4, 2, 1)] * 2
    pieces = [[f"{p.parameter}[{p.start}:{p.end}]@{p.master}+{p.offset}" for p in part.pieces] for part in partitions]
    assert pieces == [
        ["a[0:3]@0+0", "b[0:1]@0+3", "c[0:2]@1+0", "d[0:1]@2+0"],
        ["a[3:6]@0+0", "b[1:2]@0+3", "c[2:3]@1+0"],
    ]


@pytest.mark.parametrize("groups", [SIZES, REGROUPED], ids=["same groups", "other groups"])
@pytest.mark.parametrize("there", SHARDINGS, ids=str)
def test_every_element_comes_to_its_new_place(there: Sharding, groups: list[dict[str, int]]) -> None:
    for here in SHARDINGS:
        for rank in range(here.ranks):
            expected, found = file_of(groups, here, rank).tensors, empty_state(groups, here, rank).tensors()
            written = partitions_of(SIZES, there)[: None if there.zero_stage else 1]
            overlaps = overlaps_of(partitions_of(groups, here)[rank], written)
            copy_elements(found, overlaps, lambda other: file_of(SIZES, there, other))
            for name, tensor in found.items():
                if name.endswith(" step"):
                    assert tensor == (7.0 if found[f"master {name.split()[1]}"].any() else 0.0)
                else:
                    assert torch.equal(tensor, expected[name])


def test_a_file_that_is_too_short_is_refused() -> None:
    there, here = Sharding(ranks=1, zero_stage=2), Sharding(ranks=2, zero_stage=2)
    short = RankFile(  # of 49 elements
        tensors={"master 0": torch.zeros(48), "master 1": torch.zeros(4)}, values={"states": {"state 0": {}}}
    )
    overlaps = overlaps_of(partitions_of(SIZES, here)[1], partitions_of(SIZES, there))
    with pytest.raises((RuntimeError, IndexError, KeyError)):
        copy_elements(empty_state(SIZES, here, 1).tensors(), overlaps, lambda rank: short)


@pytest.mark.parametrize("there", [1, 2, 3, 7])
@pytest.mark.parametrize("here", [1, 2, 3, 7])
def test_every_element_of_a_copy_comes_to_its_new_place(there: int, here: int) -> None:
    """The copies of an adapter's initial state, and a self-teacher's, are divided at stage 3. Padding is 99."""
    numel = 5
    whole = torch.arange(float(numel)).view(1, numel)
    parts = list(pad(whole.flatten(), (0, -numel % there), value=99.0).chunk(there))
    size = -(-numel // here)
    for rank in range(here):
        target = torch.full((size,), -1.0)
        copy_shared(parts, numel, begin=rank * size, target=target)
        assert target.tolist() == pad(whole.flatten(), (0, size * here - numel), value=-1.0).chunk(here)[rank].tolist()
    target = torch.zeros(1, numel)
    copy_shared(parts, numel, begin=0, target=target)
    assert torch.equal(target, whole)
    with pytest.raises(ValueError, match=r"a copy of 30 elements is not in"):
        copy_shared(parts, 30, begin=0, target=target)


def record_of(groups: list[dict[str, int]], **changes: Any) -> EngineRecord:
    values: dict[str, Any] = {
        "model": "m",
        "ranks": 2,
        "zero_stage": 2,
        "dtype": "float32",
        "optimizer": "adamw",
        "frozen_weights": "00",
        "steps": 3,
        "updates_per_step": 1,
    }
    return EngineRecord(groups=groups, **values | changes)


@pytest.mark.parametrize(("there", "here"), [((2, 2), (1, 2)), ((2, 2), (2, 3)), ((1, 0), (2, 2)), ((2, 3), (4, 3))])
def test_states_of_several_weights_are_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[int, int], here: tuple[int, int]
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    options = [{"ranks": ranks, "zero_stage": stage, "optimizer": "adamw_8bit"} for ranks, stage in (there, here)]
    saved, own = (record_of(SIZES, **values) for values in options)
    message = f"was written with {saved.sharding} and cannot be continued with {own.sharding}: adamw_8bit has states"
    with pytest.raises(UserError, match=message):
        take_over(empty_state(SIZES, own.sharding, 0), tmp_path, saved=saved, own=own)


@pytest.mark.parametrize(("before", "now"), [("at 0", "above 0"), ("above 0", "at 0")])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adafactor", "muon"])
def test_weight_decay_is_not_switched_where_states_belong_to_several_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, before: str, now: str
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    groups = {"at 0": [{name: numel for group in SIZES for name, numel in group.items()}], "above 0": SIZES}
    saved, own = (record_of(groups[decay], ranks=1, optimizer=optimizer) for decay in (before, now))
    state = empty_state(own.groups, own.sharding, 0)
    message = rf"with train\.weight_decay {before}, and it is {now} now.* Keep train\.weight_decay {before}\.$"
    with pytest.raises(UserError, match=message):
        take_over(state, tmp_path, saved=saved, own=own)


def test_a_checkpoint_without_the_copies_of_this_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    record, sharding = record_of(SIZES, ranks=1), Sharding(ranks=1, zero_stage=2)
    file, state = file_of(SIZES, sharding, 0), empty_state(SIZES, sharding, 0)
    rest = {"counters": {}, "period": 0, "random": {}, "record": record.model_dump()}
    write_rank(tmp_path, 0, file.tensors, {**file.values, **rest})
    state.copies = lambda: {"shadow up": (torch.zeros(12), 12)}
    message = rf"{tmp_path} has no shadow up, .* saved values of algorithm\.teacher_weights, policy\.lora"
    with pytest.raises(UserError, match=message):
        take_over(state, tmp_path, saved=record, own=record)


@pytest.mark.parametrize(
    ("steps", "updates", "updates_now", "expected"),
    [
        (50, 1, 2, 100),
        (100, 2, 1, 50),
        (150, 3, 2, 100),
        (149, 3, 3, 149),  # one update had no token to train on
        (0, 4, 1, 0),
    ],
)
def test_a_record_comes_back_with_the_steps_of_as_many_training_steps(
    tmp_path: Path, steps: int, updates: int, updates_now: int, expected: int
) -> None:
    """A resume in the middle of a run, with twice as many updates, continues at half of the learning rate."""
    record = record_of(SIZES, steps=steps, updates_per_step=updates)
    record.write(tmp_path)
    assert EngineRecord.read(tmp_path) == record
    assert record.steps_of(record_of([], updates_per_step=updates_now)) == expected


def test_bfloat16_weights_follow_the_float32_weights_that_were_restored() -> None:
    """At stage 0 DeepSpeed cannot spread the float32 weights."""
    module = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    master = module.weight.detach().float().clone()
    wrapped = SimpleNamespace(fp16_groups=[[module.weight]], fp32_groups=[[master]])
    counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
    engine = SimpleNamespace(optimizer=wrapped, module=SimpleNamespace(module=module), **counters)
    state = RankState(engine, torch.optim.AdamW([master], lr=0.0), zero_stage=0)
    state.create()
    values = state.values()
    state.tensors()["master 0"].fill_(0.5)  # as a snapshot replaces it
    state.restore(values)
    state.spread_masters()
    assert torch.equal(module.weight, torch.full((2, 3), 0.5, dtype=torch.bfloat16))
