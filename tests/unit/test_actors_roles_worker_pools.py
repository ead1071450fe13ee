"""Pools of workers respect time limits and replace lost workers. Handles answer in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray.exceptions import RayActorError

from actors.cluster.processes import Processes
from actors.roles.group import WorkerPool
from actors.roles.teacher import OnlineTeacherWorkers, TeacherWorkers
from actors.roles.worker_pools import ReferenceWorkers, RewardWorkers
from rlhf.config.schema.cluster import Restarts
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import RunError, WorkerLost
from rlhf.rewards.scoring import RewardSpec
from rlhf.rewards.services.client import ServiceSpec
from rlhf.rewards.services.remote import RemoteReward
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.spans import Played, Sampled, assemble
from rlhf.types import ONLY_TEACHER, MinibatchPlan, RankedRollouts, RewardError, TeacherPrompt
from tests.fakes.calls import method, ref, settle
from tests.fakes.groups import completed_group, group_request

TASTE = RewardSpec(name="taste", weight=1.0, function=None)
STYLE = RewardSpec(
    name="style",
    weight=1.0,
    function=None,
    remote=RemoteReward(
        service=ServiceSpec(url="http://h/", timeout_s=1.0, deadline_s=1.0, max_in_flight=5), judge=None
    ),
    only={"kind": ("a",)},
)


class Handle:
    """A worker's handle with a fixed time for each group."""

    def __init__(self, *, takes_s: float = 0.0, asked_at_once: int = 1) -> None:
        thread, threads = ThreadPoolExecutor(1), ThreadPoolExecutor(16)
        self.asked, self.asking, self.most_asking = 0, 0, 0
        self.given: list[Any] = []
        together, lock = threading.Barrier(asked_at_once), threading.Lock()

        def ask(*_: Any) -> dict[str, Any]:
            with lock:
                self.asked += 1
                self.asking += 1
                self.most_asking = max(self.most_asking, self.asking)
            together.wait(10.0)
            time.sleep(0.02)  # one more call would come meanwhile
            with lock:
                self.asking -= 1
            return {"style": "told"}

        def score(prompt: Any, rollouts: Any, truncated: Any, asked: Any, environment: Any, results: Any) -> None:
            self.given.append(asked)
            time.sleep(takes_s)

        self.start = method(lambda: thread.submit(lambda: None))
        self.score = method(partial(thread.submit, score))
        self.ask = method(partial(threads.submit, ask))


def settings(*specs: RewardSpec, processes: int = 1) -> Any:
    return SimpleNamespace(specs=specs, processes=processes, timeout_s=1.0)


def group_of(group_id: int, columns: Any = MappingProxyType({}), samples: int = 2) -> Any:
    """Return a group for scoring or for a column."""
    prompt = SimpleNamespace(columns=columns, prompt_id=group_id)
    info = SimpleNamespace(environment_error=None, finish_reason="stop", environment_rewards=None, session=None)
    request = SimpleNamespace(group_id=group_id, prompt=prompt)
    ids = SimpleNamespace(sequence_ids=(group_id,))
    return SimpleNamespace(request=request, rollouts=f"group {group_id}", infos=(info,) * samples, columns=ids)


def score(handles: list[Handle], groups: int, *specs: RewardSpec, columns: Any = MappingProxyType({})) -> None:
    """Score all groups at once, within a second and a half each."""

    async def score_all() -> None:
        workers = RewardWorkers(cast("Any", handles), settings=settings(TASTE, *specs), deadline_s=1.5)
        await workers.start(deadline_s=5.0)
        await asyncio.gather(*(workers.score(group_of(i, columns, samples=0)) for i in range(groups)))

    asyncio.run(score_all())


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handles have no processes to look for."""

    async def wait_until_created(self: Processes, rank: int, *, deadline_s: float) -> None: ...

    monkeypatch.setattr(Processes, "wait_until_created", wait_until_created)


def test_work_that_takes_too_long_counts_and_waiting_for_a_worker_does_not() -> None:
    score([Handle(takes_s=0.4), Handle(takes_s=0.4)], groups=10)
    with pytest.raises(RunError, match=r"reward rank 0 did not answer within 2 s \(the limits of the rewards and"):
        score([Handle(takes_s=3.0)], groups=1)


@pytest.mark.parametrize("num_failed", [1, 2])
async def test_a_group_with_a_failed_conversation_is_not_scored_and_so_not_trained(num_failed: int) -> None:
    """Before its first turn, a conversation has no columns of the sampler, such as likeliest tokens."""
    request = group_request(0, samples=2)
    error = RewardError(reward="environment", kind="raised", message="no", prompt_id=0, sample=0)
    top = torch.tensor([[7, 9]]), torch.tensor([[-1.0, -2.0]])
    turn = Sampled(token_ids=(7,), logprobs=(-1.0,), versions=(0,), finish_reason="stop", top=top)
    failed = Played(prompt_token_ids=(1, 2), spans=(), finish_reason="length", error=error)
    played = Played(prompt_token_ids=(1, 2), spans=(turn,), finish_reason="stop")
    rollouts, infos = assemble(request, [failed, played if num_failed == 1 else failed])
    assert isinstance(rollouts, RankedRollouts) is (num_failed == 1)
    workers = RewardWorkers(cast("Any", [handle := Handle()]), settings=settings(TASTE), deadline_s=1.5)
    scores = await workers.score(CompletedGroup(request=request, rollouts=cast("Any", rollouts), infos=infos))
    assert (scores.scores, scores.errors) == ((), (error,) * num_failed)
    assert (handle.asked, handle.given) == (0, [])


def test_services_are_asked_about_many_groups_at_once_and_not_about_rows_of_others() -> None:
    handle = Handle(asked_at_once=5)  # each call waits until five have come
    score([handle], 10, STYLE, columns={"kind": "a"})
    assert (handle.most_asking, handle.given) == (5, [{"style": "told"}] * 10)
    handle = Handle()
    score([handle], 2, STYLE, columns={"kind": "b"})
    assert (handle.asked, handle.given) == (0, [{}, {}])


class Calls:
    """A worker whose calls wait until the test answers or kills the worker. Calls have the names of groups."""

    def __init__(self, *, dies_at_start: bool = False) -> None:
        self.dies_at_start = dies_at_start
        self.waiting: dict[Any, Future[Any]] = {}
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any, **_: Any) -> Any:
            future: Future[Any] = Future()
            if name == "start" and self.dies_at_start:
                future.set_exception(RayActorError())
            elif name in ("start", "become", "load_data"):
                self.asked.append((name, *args))
                future.set_result(None)
            else:
                self.waiting[args[1] if name == "score" else args[0]] = future
            return ref(future)

        def options(num_returns: int) -> Any:
            columns = [f"{id(self)}.{place}" for place in range(num_returns - 1)]
            return SimpleNamespace(remote=lambda _, __, *given, **___: [*columns, remote(given)])

        return SimpleNamespace(remote=remote, options=options)

    def answer(self, call: Any) -> None:
        self.waiting.pop(call).set_result(f"of {call}")

    def die(self) -> None:
        for call in list(self.waiting):
            self.waiting.pop(call).set_exception(RayActorError())


class Losses:
    """A supervisor that allows all losses except at forbidden work."""

    def __init__(self, *forbidden: Any) -> None:
        self.forbidden = forbidden
        self.losses: list[WorkerLost] = []

    async def recover(self, lost: WorkerLost, rebuild: Callable[[], Any], *, work: Any = None) -> None:
        if work in self.forbidden:
            raise lost
        self.losses.append(lost)
        await rebuild()

    def succeeded(self, role: str, rank: int) -> None: ...

    def forgive(self, losses: Sequence[WorkerLost]) -> None: ...


def pool(kind: Callable[..., Any], *handles: Calls, supervisor: Any, **more: Any) -> Any:
    """Return a pool of the given workers. A replacement comes from the next handle."""
    workers = kind(list(handles), lambda _: Calls(), deadline_s=60.0, **more)
    workers.supervisor, workers.start_deadline_s = supervisor, 60.0
    return workers


@pytest.fixture
def replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end_one(self: Processes, rank: int) -> None: ...

    monkeypatch.setattr(Processes, "end_one", end_one)


@pytest.mark.usefixtures("replaced_at_once")
@pytest.mark.parametrize("culprit", [0, 1, 2])
async def test_the_group_that_ends_its_worker_is_found_and_the_others_are_scored(culprit: int) -> None:
    supervisor = Losses()
    workers = pool(RewardWorkers, Calls(), supervisor=supervisor, settings=settings(processes=3))
    tasks = [asyncio.create_task(workers.score(group_of(group_id))) for group_id in range(4)]
    in_work: list[set[int]] = []
    await settle()
    while not all(task.done() for task in tasks):
        (worker,) = workers.handles
        present = {int(call.removeprefix("group ")) for call in worker.waiting}
        in_work.append(present)
        if culprit in present:
            worker.die()
        else:
            worker.answer(next(iter(worker.waiting)))
        await settle()
    assert in_work[0] == {0, 1, 2}
    assert sorted(map(len, in_work[1:])) == [1, 1, 1, 1]  # one at a time, then the group that found no free worker
    assert in_work[-1] == {3}
    assert len(supervisor.losses) == 2  # three groups shared the first rebuild
    results = [task.result() for task in tasks]
    errors = results.pop(culprit).errors
    assert [(error.kind, error.prompt_id, error.sample) for error in errors] == [
        ("died", culprit, sample) for sample in (0, 1)
    ]
    assert "reward rank 0 died" in errors[0].message
    assert all(str(result).startswith("of ") for result in results)


@pytest.mark.usefixtures("replaced_at_once")
async def test_a_reward_worker_that_may_not_be_replaced_ends_the_work() -> None:
    for supervisor in (None, Losses(None)):
        workers = pool(RewardWorkers, worker := Calls(), supervisor=supervisor, settings=settings())
        task = asyncio.create_task(workers.score(group_of(0)))
        await settle()
        worker.die()
        with pytest.raises(WorkerLost, match="rewards: reward rank 0 died"):
            await task


@pytest.mark.usefixtures("replaced_at_once")
async def test_a_lost_reference_worker_is_asked_again_with_the_model_that_it_had() -> None:
    first, second = Calls(), Calls()
    supervisor = Losses()
    workers = pool(ReferenceWorkers, first, second, supervisor=supervisor)
    await workers.become(Path("references/step_4"))
    groups = [group_of(group_id) for group_id in range(4)]
    both = [asyncio.create_task(workers.logprobs([groups[0]])), asyncio.create_task(workers.logprobs(groups[2:]))]
    await settle()
    first.die()
    await settle()
    successor, beside = workers.handles
    assert beside is second
    assert successor.asked == [("start",), ("become", "references/step_4")]
    assert len(supervisor.losses) == 1  # both calls share the loss
    for worker in (successor, second):
        for call in list(worker.waiting):
            worker.answer(call)
    (alone,), pair = [await task for task in both]
    assert alone.ref.startswith(str(id(successor)))
    assert [str(id(worker)) for worker in (successor, second)] == [column.ref.split(".")[0] for column in pair]
    assert [column.sequence_ids for column in pair] == [(2,), (3,)]


@pytest.mark.usefixtures("replaced_at_once")
async def test_a_lost_teacher_gets_its_data_again() -> None:
    workers = pool(TeacherWorkers, worker := Calls(), supervisor=Losses())
    await workers.load_data(["train", "eval"], lengths=[[3, 4], [5]])
    plan = MinibatchPlan(sequences_by_rank=((0,), (1,)), num_tokens=7, num_sequences=2)
    task = asyncio.create_task(workers.states(0, plan))
    await settle()
    worker.die()
    await settle()
    (successor,) = workers.handles
    assert successor.asked == [("start",), ("load_data", "train", "eval")]
    successor.answer(())
    assert await task == [[f"{id(successor)}.0"], [f"{id(successor)}.1"]]


@pytest.mark.usefixtures("replaced_at_once")
async def test_a_call_names_its_work_for_a_worker_that_is_lost_twice() -> None:
    workers: WorkerPool = pool(ReferenceWorkers, worker := Calls(), supervisor=Losses((2, 3)))
    task = asyncio.create_task(workers.logprobs([group_of(2), group_of(3)]))  # type: ignore[attr-defined]
    await settle()
    worker.die()
    with pytest.raises(WorkerLost, match="reference: reference rank 0 died"):
        await task


def real_supervisor(**limits: Any) -> tuple[Supervisor, list[str]]:
    """Return a run's supervisor, and the recorded losses."""
    recorded: list[str] = []
    tracker = SimpleNamespace(log_error=lambda error: recorded.append(error.message), alert=lambda *_: None)
    record: Any = SimpleNamespace(step=0, tracker=tracker, timeline=SimpleNamespace(span=lambda *_: nullcontext()))
    return Supervisor(Restarts(**limits), record, ("reference", "reward")), recorded


@pytest.mark.usefixtures("replaced_at_once")
async def test_a_worker_that_dies_at_its_first_start_is_started_again_once() -> None:
    supervisor, recorded = real_supervisor()
    workers = pool(ReferenceWorkers, Calls(dies_at_start=True), beside := Calls(), supervisor=supervisor)
    await workers.start(deadline_s=60.0)
    assert [worker.asked for worker in workers.handles] == [[("start",)], [("start",)]]
    assert workers.handles[1] is beside
    assert len(recorded) == 1
    assert "start: reference rank 0 died" in recorded[0]
    for supervisor, told in (real_supervisor(), (None, None)):
        workers = pool(ReferenceWorkers, Calls(dies_at_start=True), supervisor=supervisor)
        workers._spawn_one = lambda _: Calls(dies_at_start=True)
        with pytest.raises(WorkerLost, match="start: reference rank 0 died"):
            await workers.start(deadline_s=60.0)
        assert told is None or len(told) == 1


async def score_all(workers: Any, groups: list[int], loses: Callable[[int, int], bool]) -> list[Any]:
    """Score groups in order, three at once. `loses` decides whether a group ends a worker at an attempt, from 0."""
    attempts: Counter[int] = Counter()
    tasks = [asyncio.create_task(workers.score(group_of(group_id))) for group_id in groups]
    await settle()
    while not all(task.done() for task in tasks):
        (worker,) = workers.handles
        present = sorted(int(call.removeprefix("group ")) for call in worker.waiting)
        if any(loses(group_id, attempts[group_id]) for group_id in present):
            attempts.update(present)
            worker.die()
        elif present:
            worker.answer(f"group {present[0]}")
        await settle()
    failures = [failure for task in tasks if (failure := task.exception()) is not None]
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]


def reward_pool(supervisor: Supervisor) -> Any:
    return pool(RewardWorkers, Calls(), supervisor=supervisor, settings=settings(processes=3))


@pytest.mark.usefixtures("replaced_at_once")
@pytest.mark.parametrize("groups", [range(30), [0, 1, 10, 2, 3, 11, 12, 4, 20, 5, 30, 40]])
async def test_groups_that_end_their_worker_use_up_no_restarts(groups: Sequence[int]) -> None:
    """Two of three culprits may share their first loss."""
    supervisor, recorded = real_supervisor(worker=5)
    poisonous = {group_id for group_id in groups if group_id % 10 == 0} | ({11, 12} & set(groups))
    results = await score_all(reward_pool(supervisor), list(groups), lambda group_id, _: group_id in poisonous)
    assert {group_id for group_id, result in zip(groups, results, strict=True) if not isinstance(result, str)} == (
        poisonous
    )
    assert len(recorded) > 5


@pytest.mark.usefixtures("replaced_at_once")
@pytest.mark.parametrize("loses", [lambda _, attempt: attempt == 0, lambda *_: True], ids=["other groups", "any group"])
async def test_a_worker_that_is_lost_each_time_uses_up_its_restarts(loses: Callable[[int, int], bool]) -> None:
    supervisor, recorded = real_supervisor(worker=4)
    with pytest.raises(WorkerLost):
        await score_all(reward_pool(supervisor), list(range(30)), loses)
    assert len(recorded) == 4


def answered_group(index: int, *sequence_ids: int) -> Any:
    request = group_request(index, samples=len(sequence_ids), first_sequence_id=sequence_ids[0])
    return completed_group(request, f"group {index}", tokens=[10 - i for i in sequence_ids])


class TeacherWorker:
    """A teacher's worker that records calls and answers at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.prompts: dict[int, Any] = {}  # of the last call
        self.states = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self.call))

    def call(self, shares: list[list[int]], *given: str, teacher: str, prompts: Any = None) -> list[Any]:
        self.prompts = prompts
        self.calls.append((shares, *given) if teacher == ONLY_TEACHER else (teacher, shares, *given))
        return [*(f"states of {share}" for share in shares), ref(1)]


def test_a_worker_of_the_teacher_is_handed_the_groups_of_its_rows() -> None:
    workers = [TeacherWorker(), TeacherWorker()]
    teacher = OnlineTeacherWorkers(cast("Any", workers), deadline_s=60.0)
    groups = [answered_group(0, 0, 1), answered_group(1, 2, 3), answered_group(2, 4, 5)]
    plan = MinibatchPlan(sequences_by_rank=((0, 4), (5,)), num_tokens=9, num_sequences=3)
    by_rank = asyncio.run(teacher.states(plan, groups))
    # the rows have 12, 8 and 7 tokens: the first worker gets row 0, the second gets rows 4 and 5
    assert [worker.calls for worker in workers] == [[([[0], []], "group 0")], [([[4], [5]], "group 2")]]
    assert by_rank == [["states of [0]", "states of [4]"], ["states of []", "states of [5]"]]


def test_a_teacher_with_another_tokenizer_gets_the_prompts_in_its_tokens() -> None:
    worker = TeacherWorker()
    teacher = OnlineTeacherWorkers(cast("Any", [worker]), deadline_s=60.0)
    groups = [answered_group(0, 0, 1), answered_group(1, 2, 3)]
    prompt = TeacherPrompt(token_ids=(7, 8), end=1)
    request = replace(groups[1].request, prompt=replace(groups[1].request.prompt, teacher_prompt=prompt))
    groups[1] = replace(groups[1], request=request)
    plan = MinibatchPlan(sequences_by_rank=((0, 2),), num_tokens=9, num_sequences=2)
    asyncio.run(teacher.states(plan, groups))
    assert worker.prompts == {2: prompt, 3: prompt}


def test_the_rows_of_each_teacher_are_asked_for_in_turn() -> None:
    workers = [TeacherWorker(), TeacherWorker()]
    teacher = OnlineTeacherWorkers(cast("Any", workers), deadline_s=60.0)
    groups = [answered_group(0, 0, 1), answered_group(1, 2, 3), answered_group(2, 4, 5)]
    owners = {0: "math", 1: "math", 2: "code", 3: "code", 4: "math", 5: "math"}
    plan = MinibatchPlan(sequences_by_rank=((0, 2, 4), (3,)), num_tokens=9, num_sequences=4, teachers=owners)
    by_rank = asyncio.run(teacher.states(plan, groups))
    assert [worker.calls for worker in workers] == [
        [("code", [[2], []], "group 1"), ("math", [[0], []], "group 0")],
        [("code", [[], [3]], "group 1"), ("math", [[4], []], "group 2")],
    ]
    assert by_rank[0] == ["states of [2]", "states of []", "states of [0]", "states of [4]"]
    assert by_rank[1] == ["states of []", "states of [3]", "states of []", "states of []"]
    asyncio.run(teacher.states(plan, groups))
    assert [call[0] for call in workers[0].calls] == ["code", "math", "math", "code"]  # the present one is first


def test_a_repeated_row_is_computed_once_for_each_rank() -> None:
    worker = TeacherWorker()
    worker.states.options = lambda num_returns: SimpleNamespace(
        remote=lambda dataset, shares, teacher: worker.call(shares, teacher=teacher)
    )
    teacher = TeacherWorkers(cast("Any", [worker]), deadline_s=60.0)
    teacher.lengths = [[1] * 10]
    plan = MinibatchPlan(sequences_by_rank=((5, 9, 5), (5, 5)), num_tokens=5, num_sequences=5)
    assert asyncio.run(teacher.states(0, plan)) == [["states of [5, 9]"], ["states of [5]"]]
