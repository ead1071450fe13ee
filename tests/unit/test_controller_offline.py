"""rlhf/controller/offline.py evaluates in parts, and repeats steps after a loss."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.schema.cluster import Restarts
from rlhf.controller.offline import OfflineController
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.data.stream import Stream
from rlhf.errors import WorkerLost
from rlhf.tracking.display.progress_live import open_progress
from rlhf.tracking.metrics.reductions import Sum
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.run_folder.timeline import Timeline
from rlhf.types import MinibatchPlan
from tests.fakes.configs import offline_config


@dataclass(frozen=True)
class SomeRow:
    example_id: int
    token_ids: tuple[int, ...]
    num_targets: int
    non_token_bytes: bytes = b""


class Role:
    """Two ranks that record calls."""

    num_ranks = 2

    def __init__(self) -> None:
        self.plans: list[MinibatchPlan] = []

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: tuple[()]) -> dict[str, Any]:
        self.plans.append(plan)
        return {}


def test_pieces_of_an_evaluation_are_divided_by_the_counts_of_the_whole_set() -> None:
    rows = [SomeRow(example_id=i, token_ids=(0,) * (i + 1), num_targets=i) for i in range(7)]
    role: Any = Role()
    train: Any = SimpleNamespace(sequences_per_update=3, best_metric=None, early_stopping=None)
    record: Any = SimpleNamespace(stage=lambda *_, **__: nullcontext(), add=lambda _: None)
    controller = OfflineController(
        SimpleNamespace(train=train, cluster=SimpleNamespace(restarts=Restarts(gang=0))),  # type: ignore[arg-type]
        role,
        record,
        train_set=rows,
        rows=Stream(rows, seed=0, shuffle=True),
        eval_sets={"heldout": rows},
        policy_fingerprint="",
        supervisor=Supervisor(Restarts(), record, ()),
    )
    asyncio.run(controller.evaluate(1))
    shares = [[set(ids) for ids in plan.sequences_by_rank] for plan in role.plans]
    assert [set.union(*ranks) for ranks in shares] == [{0, 1, 2}, {3, 4, 5}, {6}]
    assert set() in shares[-1]  # one row for two ranks
    assert {(plan.num_tokens, plan.num_sequences) for plan in role.plans} == {(0 + 1 + 2 + 3 + 4 + 5 + 6, 7)}


class Ranks:
    """A policy with the list of trained plans as the state. The policy is lost in a call of `lost`."""

    num_ranks = 1

    def __init__(self, lost: str, *, is_whole: bool) -> None:
        self.state: list[MinibatchPlan] = []
        self.snapshots: dict[int, list[MinibatchPlan]] = {}
        self.lost, self.is_whole = lost, is_whole
        self.calls: list[str] = []

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.lost and self.calls.count(call) == 1:
            if not self.is_whole:
                del self.snapshots[max(self.snapshots)]
            raise WorkerLost("lost", role="policy", rank=0, stage="update", kind="died")

    async def update_on(self, plan: MinibatchPlan, states: tuple[()], *, snapshot: int | None = None) -> dict[str, Any]:
        self.state = [*self.state, plan]
        self.note(f"update {len(self.state)}")
        return {"update/tokens/total": Sum(total=plan.num_tokens)}

    async def take_snapshot(self, step: int) -> None:
        self.snapshots[step] = self.state
        self.note(f"snapshot {step}")

    async def newest_snapshot(self) -> int | None:
        return max(self.snapshots, default=None)

    async def restart(self) -> None:
        self.state = []

    async def restore_snapshot(self, step: int) -> None:
        self.state = self.snapshots[step]


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "half a copy"])
@pytest.mark.parametrize("lost", ["none", "update 1", "update 3", "snapshot 2"])
def test_a_step_is_made_again_after_a_loss_also_the_one_before_it(lost: str, is_whole: bool, tmp_path: Path) -> None:
    rows = [SomeRow(example_id=i, token_ids=(0,) * (i + 1), num_targets=i) for i in range(7)]
    config = offline_config()
    ranks, unused = Ranks(lost, is_whole=is_whole), SimpleNamespace(log_error=lambda _: None, alert=lambda *_: None)
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        record = RunRecord(
            folder=folder,
            tracker=unused,  # type: ignore[arg-type]
            timeline=Timeline(folder.timeline),
            progress=open_progress(3, mode="quiet"),
        )
        controller = OfflineController(
            config,
            ranks,  # type: ignore[arg-type]
            record,
            train_set=rows,
            rows=Stream(rows, seed=0, shuffle=False),
            eval_sets={},
            policy_fingerprint="",
            supervisor=Supervisor(Restarts(), record, ("policy",)),
        )

        async def three_steps() -> list[float]:
            await controller.despite_losses(partial(controller.take_snapshot, 0))
            tokens = []
            for step in range(1, 4):
                record.begin_step(step)
                await controller.train_step(step)
                tokens.append(record.row()["update/tokens/total"])
            return tokens

        assert asyncio.run(three_steps()) == [1.0, 5.0, 9.0]
    assert [plan.num_tokens for plan in ranks.state] == [1, 5, 9]
    again = {("update 3", False): ["update 2", "snapshot 2", "update 3"], ("update 3", True): ["update 3"]}
    if (lost, is_whole) in again:
        place = ranks.calls.index(lost) + 1
        assert ranks.calls[place:] == [*again[lost, is_whole], "snapshot 3"]
