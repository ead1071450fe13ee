"""rlhf/controller/offline.py evaluates in parts, repeats steps after a loss, and asks a teacher in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.controller.offline import OfflineController
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.data.examples import Example
from rlhf.data.stream import Stream
from rlhf.errors import WorkerLost
from rlhf.tracking.metrics.reductions import Sum
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.types import MinibatchPlan
from tests.fakes.configs import offline_config
from tests.fakes.records import quiet_record


def rows(count: int) -> list[Example]:
    """Return rows of 1, 2, ... tokens, all but the first in the loss mask."""
    return [Example(example_id=i, token_ids=(0,) * (i + 1), loss_mask=(False, *[True] * i)) for i in range(count)]


class Ranks:
    """A policy with the list of trained plans as the state. The policy is lost in the call `lost`. Updates are slow."""

    def __init__(self, *, lost: str = "none", is_whole: bool = True, num_ranks: int = 1) -> None:
        self.lost, self.is_whole, self.num_ranks = lost, is_whole, num_ranks
        self.state: list[MinibatchPlan] = []
        self.snapshots: dict[int, list[MinibatchPlan]] = {}
        self.calls: list[str] = []
        self.evaluated: list[MinibatchPlan] = []

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.lost and self.calls.count(call) == 1:
            if not self.is_whole:
                del self.snapshots[max(self.snapshots)]
            raise WorkerLost("lost", role="policy", rank=0, stage="update", kind="died")

    async def update_on(self, plan: MinibatchPlan, states: Any, *, snapshot: int | None = None) -> dict[str, Any]:
        self.state = [*self.state, plan]
        self.note(f"update {len(self.state)} by {states}" if states else f"update {len(self.state)}")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.calls += ["updated"] if states else []
        return {"update/tokens/total": Sum(total=plan.num_tokens)}

    async def evaluate(self, dataset: int, name: str, plan: MinibatchPlan, states: Any) -> dict[str, Any]:
        self.evaluated.append(plan)
        return {}

    async def take_snapshot(self, step: int) -> None:
        self.snapshots[step] = self.state
        self.note(f"snapshot {step}")

    async def newest_snapshot(self) -> int | None:
        return max(self.snapshots, default=None)

    async def restart(self) -> None:
        self.state = []

    async def restore_snapshot(self, step: int) -> None:
        self.state = self.snapshots[step]


@pytest.fixture
def record(tmp_path: Path) -> Iterator[RunRecord]:
    tracker = SimpleNamespace(log_error=lambda _: None, alert=lambda *_: None)
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        yield quiet_record(folder, tracker)


def controller_of(ranks: Ranks, record: RunRecord, data: list[Example], **options: Any) -> OfflineController:
    """Return the loop of a run. `cluster` and further sections change the configuration."""
    eval_sets, teacher = options.pop("eval_sets", {}), options.pop("teacher_role", None)
    config, stream = offline_config(**options), Stream(data, seed=0, shuffle=False)
    supervisor, role = Supervisor(config.cluster.restarts, record, ("policy",)), dict[str, Any](role=ranks)
    data_sets: Any = {"train_set": data, "rows": stream, "eval_sets": eval_sets}
    return OfflineController(
        config, **role, record=record, **data_sets, policy_fingerprint="", supervisor=supervisor, teacher=teacher
    )


async def test_parts_of_an_evaluation_are_divided_by_the_counts_of_the_whole_set(record: RunRecord) -> None:
    ranks, data = Ranks(num_ranks=2), rows(7)
    controller = controller_of(ranks, record, data, eval_sets={"heldout": data}, train={"sequences_per_update": 3})
    await controller.evaluate(1)
    shares = [[set(ids) for ids in plan.sequences_by_rank] for plan in ranks.evaluated]
    assert [set.union(*by_rank) for by_rank in shares] == [{0, 1, 2}, {3, 4, 5}, {6}]
    assert set() in shares[-1]  # one row for two ranks
    assert {(plan.num_tokens, plan.num_sequences) for plan in ranks.evaluated} == {(0 + 1 + 2 + 3 + 4 + 5 + 6, 7)}


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "half a copy"])
@pytest.mark.parametrize("lost", ["none", "update 1", "update 3", "snapshot 2"])
async def test_a_step_is_made_again_after_a_loss_also_the_one_before_it(
    record: RunRecord, lost: str, is_whole: bool
) -> None:
    ranks = Ranks(lost=lost, is_whole=is_whole)
    controller = controller_of(ranks, record, rows(7))
    await controller.despite_losses(partial(controller.take_snapshot, 0))
    for step, tokens in ((1, 1.0), (2, 5.0), (3, 9.0)):
        record.begin_step(step)
        await controller.train_step(step)
        assert record.row()["update/tokens/total"] == tokens
    assert [plan.num_tokens for plan in ranks.state] == [1, 5, 9]
    again = {("update 3", False): ["update 2", "snapshot 2", "update 3"], ("update 3", True): ["update 3"]}
    if (lost, is_whole) in again:
        place = ranks.calls.index(lost) + 1
        assert ranks.calls[place:] == [*again[lost, is_whole], "snapshot 3"]


class Teacher:
    """A teacher whose states name the rows. Requests are recorded."""

    role = "teacher"

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def states(self, dataset: int, plan: MinibatchPlan) -> str:
        self.calls.append(f"teach {plan.sequences_by_rank[0]}")
        return str(plan.sequences_by_rank[0])


@pytest.mark.parametrize(
    ("colocate_with", "expected"),
    [
        (
            "policy",
            [
                *("teach (0, 1)", "update 1 by (0, 1)", "updated"),
                *("teach (2, 3)", "update 2 by (2, 3)", "updated"),
                *("teach (4, 0)", "update 3 by (4, 0)", "updated"),
            ],
        ),
        (
            None,  # a step ahead
            [
                *("teach (0, 1)", "update 1 by (0, 1)", "teach (2, 3)", "updated"),
                *("update 2 by (2, 3)", "teach (4, 0)", "updated"),
                *("update 3 by (4, 0)", "updated"),
            ],
        ),
    ],
)
async def test_a_teacher_beside_the_student_waits_and_another_is_a_step_ahead(
    record: RunRecord, colocate_with: str | None, expected: list[str]
) -> None:
    ranks = Ranks()
    controller = controller_of(
        ranks,
        record,
        rows(5),
        teacher_role=Teacher(ranks.calls),
        teacher={"model": "n"},
        algorithm={"name": "distillation"},
        cluster={"roles": {"teacher": {"colocate_with": colocate_with}}, "restarts": {"gang": 0}},
    )
    for step in range(1, 4):
        await controller.train_step(step)
        cursor = controller.state()["cursor"]
        assert 5 * cursor["epoch"] + cursor["position"] == 2 * step, "behind the rows of the step"
    assert ranks.calls == expected
    assert [plan.sequences_by_rank for plan in ranks.state] == [((0, 1),), ((2, 3),), ((4, 0),)]
