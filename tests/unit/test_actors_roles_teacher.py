"""Workers of the teacher receive columns, and return columns to the student's ranks."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from actors.roles.teacher import OnlineTeacherWorkers, TeacherWorkers
from rlhf.types import MinibatchPlan
from tests.fakes.calls import ref
from tests.fakes.groups import completed_group, group_request


def group(index: int, *sequence_ids: int) -> Any:
    request = group_request(index, samples=len(sequence_ids), first_sequence_id=sequence_ids[0])
    return completed_group(request, f"group {index}", tokens=[10 - i for i in sequence_ids])


class Worker:
    """A teacher's worker that records calls and answers at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.states = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self.call))

    def call(self, shares: list[list[int]], *given: str) -> list[Any]:
        self.calls.append((shares, *given))
        return [*(f"states of {share}" for share in shares), ref(1)]


def test_a_worker_of_the_teacher_is_handed_the_groups_of_its_rows() -> None:
    workers = [Worker(), Worker()]
    teacher = OnlineTeacherWorkers(cast("Any", workers), deadline_s=60.0)
    groups = [group(0, 0, 1), group(1, 2, 3), group(2, 4, 5)]
    plan = MinibatchPlan(sequences_by_rank=((0, 4), (5,)), num_tokens=9, num_sequences=3)
    by_rank = asyncio.run(teacher.states(plan, groups))
    # the rows have 12, 8 and 7 tokens: the first worker gets row 0, the second gets rows 4 and 5
    assert [worker.calls for worker in workers] == [[([[0], []], "group 0")], [([[4], [5]], "group 2")]]
    assert by_rank == [["states of [0]", "states of [4]"], ["states of []", "states of [5]"]]


def test_a_repeated_row_is_computed_once_for_each_rank() -> None:
    worker = Worker()
    worker.states.options = lambda num_returns: SimpleNamespace(remote=lambda dataset, shares: worker.call(shares))
    teacher = TeacherWorkers(cast("Any", [worker]), deadline_s=60.0)
    teacher.lengths = [[1] * 10]
    plan = MinibatchPlan(sequences_by_rank=((5, 9, 5), (5, 5)), num_tokens=5, num_sequences=5)
    assert asyncio.run(teacher.states(0, plan)) == [["states of [5, 9]"], ["states of [5]"]]
