"""A self-teacher's copies of the weights are read from the files of other ranks, and damage is reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.engine.shadow_weights import ShadowWeights
from rlhf.errors import UserError


def shadow_of(weight: Tensor, share: Tensor | None = None) -> ShadowWeights:
    """Return the copies of one weight. `share`: the share of a rank under ZeRO-3."""
    module: Any = nn.Module()
    module.w = nn.Parameter(weight)
    if share is not None:
        module.w.ds_tensor, module.w.ds_numel = share, weight.numel()
    engine = SimpleNamespace(module=SimpleNamespace(module=module), optimizer=None)
    return ShadowWeights(engine, sharded=share is not None, average=True)


def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Write the shares of two ranks, the last with padding. Return the whole weight."""
    whole = torch.arange(5.0)
    for rank, share in enumerate([whole[:3], torch.cat([whole[3:], torch.tensor([9.0])])]):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shadow_of(whole, share).save(folder)
    return whole


def test_a_whole_copy_is_joined_from_the_shares_of_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path, monkeypatch)
    alone = shadow_of(torch.zeros(5))
    alone.load(tmp_path)
    assert alone.copies["w"].tolist() == whole.tolist()
    half = shadow_of(whole, torch.zeros(3))
    half.load(tmp_path)
    assert half.copies["w"].tolist() == [3.0, 4.0, 0.0]  # as rank 1


def test_the_period_of_the_copies_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    written, read = shadow_of(torch.ones(2)), shadow_of(torch.ones(2))
    written.period = 3
    written.save(tmp_path)
    read.load(tmp_path)
    assert read.period == 3


def test_damaged_and_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no weights of the teacher for this run"):
        shadow_of(torch.zeros(5)).load(tmp_path)
    saved(tmp_path, monkeypatch)
    (tmp_path / "teacher_00001.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        shadow_of(torch.zeros(5)).load(tmp_path)
