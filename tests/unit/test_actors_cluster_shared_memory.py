"""A run without room for snapshots in a simulated /dev/shm is refused before models are loaded."""

from __future__ import annotations

import asyncio
import logging
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from actors.cluster.connect import OWN_RAY
from actors.cluster.shared_memory import judge, refuse_small_shared_memory
from rlhf.config.mistakes.explain import parse
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.planning.shared_memory import SharedMemoryRoom, SnapshotBytes, snapshots_by_node


def config_of(model: str = "tiny:llama", *, gang: int = 5) -> Config:
    return parse(
        {
            "run": {"name": "run"},
            "policy": {"model": model, "dtype": "float32"},
            "algorithm": {"name": "sft"},
            "data": {"train": "x.jsonl"},
            "train": {"steps": 1, "lr": 1e-3, "sequences_per_update": 4},
            "cluster": {"restarts": {"gang": gang}, "roles": {"policy": {"workers": 2}}},
        }
    )


def placement_of(*nodes: str) -> Any:
    return SimpleNamespace(nodes=lambda: set(nodes), nodes_of=lambda role: list(nodes))


@pytest.mark.parametrize(("mib", "gang", "is_refused"), [(64, 5, False), (8, 5, True), (8, 0, False)])
def test_a_run_without_room_for_its_snapshots_is_refused(
    monkeypatch: pytest.MonkeyPatch, mib: int, gang: int, is_refused: bool
) -> None:
    # The tiny model has 393,888 parameters, of which each rank keeps 12 bytes twice: 9 MiB for both ranks.
    total = mib * 2**20
    monkeypatch.setattr(OWN_RAY, "daemons", [object()])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, 0, total))
    refusal = r"^cluster.restarts.gang: is above 0, but /dev/shm has 0.01 GiB, and the run needs 0.0.*"
    remedies = r"docker run --shm-size=1g.*fewer ranks on a node.*cluster.restarts.gang=0"
    with pytest.raises(UserError, match=refusal + remedies) if is_refused else nullcontext():
        asyncio.run(refuse_small_shared_memory(config_of(gang=gang), placement_of("a", "a")))


def test_a_model_of_unknown_sizes_is_left_to_its_ranks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(refuse_small_shared_memory(config_of("some/model"), placement_of("a")))
    assert "/dev/shm is examined only when the models are loaded: the sizes of some/model" in caplog.text


def test_the_object_store_of_ray_takes_room_and_copies_are_only_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    snapshots = SnapshotBytes({"policy": 3 * 2**30}, copies=2 * 2**30)
    judge(SharedMemoryRoom(total=6 * 2**30, free=0, ray=2**30), snapshots, where="/dev/shm")
    assert not caplog.text
    judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=2 * 2**30), snapshots, where="/dev/shm of 10.0.0.2")
    assert "/dev/shm of 10.0.0.2 has 5.00 GiB, and the run needs 7.00 GiB" in caplog.text
    assert "copies of other nodes 2.00 + Ray's objects 2.00" in caplog.text
    with pytest.raises(UserError, match=r"--shm-size=8g"):
        judge(SharedMemoryRoom(total=5 * 2**30, free=0, ray=3 * 2**30), snapshots, where="/dev/shm")


def test_a_node_holds_its_own_snapshots_and_a_share_of_the_copies() -> None:
    ranks: dict[Any, list[str]] = {"policy": ["a", "a"], "critic": ["b"]}
    assert snapshots_by_node({"policy": 4, "critic": 3}, ranks, {"a", "b", "c"}) == {
        "a": SnapshotBytes({"policy": 8}, 3),
        "b": SnapshotBytes({"critic": 3}, 4),
        "c": SnapshotBytes({}, 4),
    }
    assert snapshots_by_node({"policy": 4}, {"policy": ["a"]}, {"a"}) == {"a": SnapshotBytes({"policy": 4})}
