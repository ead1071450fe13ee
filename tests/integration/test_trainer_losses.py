"""A working rank of a trained role is killed: the run ends with the weights and metrics of the unbroken run.

Real runs of the tiny model in this process, on the session's Ray. tests/chaos kills ranks in all other stages.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import memory_folders
from actors.roles.gang import Gang, PolicyGang
from rlhf.cli import main
from tests.integration.recipes import ONLINE, merge, rows, weights, without_clocks, write_config

GRPO: Mapping[str, Any] = {
    "algorithm": {"name": "grpo"},
    "data": {"eval": None},
    "eval": None,
    "rewards": {"correct": {"function": "last_number"}},
    "rollouts": {"prompts_per_step": 4},
    "train": {"steps": 3, "sequences_per_update": 8, "checkpoint_every": 100},
    "cluster": {"call_timeout_s": 60.0, "roles": {"policy": {"workers": 2, "cpus": 0.5, "threads": 1}}},
}


def train(folder: Path, name: str, *changes: Mapping[str, Any]) -> Path:
    """Return the folder of a successful run."""
    settings: Mapping[str, Any] = ONLINE
    for one in (*changes, {"run": {"name": name, "dir": str(folder)}}):
        settings = merge(settings, one)
    assert main(["train", str(write_config(folder / f"{name}.yaml", {}, settings)), "--quiet"]) == 0
    return folder / name


def kill_during(
    monkeypatch: pytest.MonkeyPatch, gang: type[Gang], method: str, *, rank: int, number: int, after_s: float = 0.01
) -> None:
    """Kill a rank during call `number` of a method."""
    original, calls = getattr(gang, method), []

    async def killing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) != number:
            return await original(self, *arguments, **options)
        working = asyncio.create_task(original(self, *arguments, **options))
        await asyncio.sleep(after_s)
        self.processes.here[rank].kill()
        return await working

    monkeypatch.setattr(gang, method, killing)


def assert_equal(killed: Path, unbroken: Path) -> None:
    """Both runs have the same rows and weights, and the killed run has recorded the losses."""
    assert without_clocks(rows(killed)) == without_clocks(rows(unbroken))
    assert weights(killed) == weights(unbroken)
    errors = [json.loads(line) for line in (killed / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {error["kind"] for error in errors} == {"died"}
    assert not [path for path in memory_folders.folders_of_user().iterdir() if f"-{os.getpid()}-" in path.name]


def test_a_step_whose_rank_is_killed_is_done_again(
    kept_engines: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbroken = train(tmp_path, "unbroken", GRPO)
    kill_during(monkeypatch, PolicyGang, "update", rank=1, number=4)  # the second update of step 2
    killed = train(tmp_path, "killed", GRPO)
    assert_equal(killed, unbroken)
    assert [row["recovery/policy/total"] for row in rows(killed)] == [0, 1, 0]


LORA = {"policy": {"lora": {"rank": 4}}}
Loss = tuple[type[Gang], str, int, int]  # a gang, its method, the rank, and the number of the call


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({"cluster": {"weight_sync": "gloo"}}, [(PolicyGang, "send", 0, 3)]),
        (LORA, [(PolicyGang, "update", 0, 3)]),
    ],
    ids=["broadcast", "lora"],
)
def test_a_rank_with_an_adapter_or_in_a_broadcast_is_killed(
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: Mapping[str, Any],
    losses: Sequence[Loss],
) -> None:
    unbroken = train(tmp_path, "unbroken", GRPO, changes)
    for gang, method, rank, number in losses:
        kill_during(monkeypatch, gang, method, rank=rank, number=number)
    killed = train(tmp_path, "killed", GRPO, changes)
    assert_equal(killed, unbroken)
