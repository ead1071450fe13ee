"""Lost engines are replaced, requests repeated, and successors proved. Actors are fakes."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.cluster.waiting import explain, within
from actors.roles.group import ending_rebuilds
from actors.rollout import engine_group
from actors.rollout.engine_weights import SyncReceipt
from rlhf.config.derive import WeightSync
from rlhf.errors import ChildLost, RunError, WorkerLost
from rlhf.roles import CompletedGroup
from rlhf.types import MemoryReport
from tests.fakes.engine_handles import (
    DEADLINE_S,
    SAMPLING,
    Engine,
    Engines,
    Policy,
    asked,
    manifest,
    policy_probe,
    request,
    synced,
    until,
)

LOADED = ["open", "load 1", "probe"]  # the calls of a successor before its first group
GONE = RayTaskError("update_weights", "", FileNotFoundError("/runs/adapter"))


async def group_of(
    first: int, successors: int, policy: Policy | None = None, *, samples: int = 2, deadline_s: float = DEADLINE_S
) -> tuple[Any, ...]:
    """Return synced engines, and then each engine and successor. `policy` gives the weights by broadcasts."""
    engines = [Engine(name, samples=samples) for name in ("first", "other")[:first]]
    later = tuple(Engine(f"successor {number}", samples=samples) for number in range(successors))
    group = Engines(*engines, successors=later, deadline_s=deadline_s)
    if policy is not None:
        group.sync = WeightSync(method="gloo", why="")
        await group.connect(cast(Any, policy), adapter=None)
    return await synced(group), *engines, *later


def generated(engines: Engines, *group_ids: int) -> asyncio.Task[list[CompletedGroup]]:
    async def groups() -> list[CompletedGroup]:
        requests = [request(group_id) for group_id in group_ids]
        return [group async for group in engines.generate(requests, SAMPLING, version=1)]

    return asyncio.create_task(groups())


async def finished(task: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(task, DEADLINE_S)


async def find_dead(engines: Engines, engine: Engine) -> None:
    """Let an engine die, and let a call find it dead."""
    engine.is_dead = True
    await engines.cancel([])


async def update(engines: Engines, version: int) -> None:
    await engines.withdraw_weights()
    await engines.update_weights(manifest(version))


async def test_a_successor_gets_the_whole_share_and_no_group_comes_twice() -> None:
    engines, first, other, successor = await group_of(2, 1)
    assert await engines.renew(Path("second_run"))  # the successor gets the same folder
    await synced(engines)
    task = generated(engines, 0, 1, 2, 3, 4)
    await until(lambda: len(first.groups) == 3 and len(other.groups) == 2)
    first.finish(2)
    await asyncio.sleep(0.01)
    first.die()
    other.finish(1, 3)
    await until(lambda: len(successor.groups) == 3)
    successor.finish(0, 2, 4)
    groups = await finished(task)
    assert sorted(group.request.group_id for group in groups) == [0, 1, 2, 3, 4]
    assert {group.request.group_id: group.rollouts for group in groups}[2] == "tokens from first"
    assert first.calls == ["hold", 0, 2, 4, "release 3"]
    assert successor.calls == ["renew second_run", *LOADED, *first.calls]
    assert other.calls == ["hold", 1, 3, "release 2"]
    assert engines.replaced == [0]


async def test_a_group_that_was_cancelled_after_its_batch_is_answered_in_another_batch_with_its_id() -> None:
    engines, engine = await group_of(1, 0)
    for _ in range(2):
        task = generated(engines, 0, 1)
        await until(lambda: len(engine.groups) == 2)
        engine.finish(0, 1)
        assert sorted(group.request.group_id for group in await finished(task)) == [0, 1]
        engine.groups.clear()
        await engines.cancel([request(0), request(1)])


async def test_a_share_with_nothing_left_but_cancelled_groups_is_not_asked_again() -> None:
    engines, first, successor = await group_of(1, 1)
    engines.may_start.clear()
    task = generated(engines, 0, 1)
    await until(lambda: len(first.groups) == 2)
    first.finish(0)
    await asyncio.sleep(0.01)
    await engines.cancel([request(1)])
    first.die()
    assert [group.request.group_id for group in await finished(task)] == [0]
    again = generated(engines, 2)
    await asyncio.sleep(0.01)
    await engines.cancel([request(2)])  # while the group waits for the successor
    engines.may_start.set()
    assert await finished(again) == []
    assert successor.calls == LOADED


async def test_an_engine_lost_twice_at_the_same_batch_ends_the_run_unless_it_finished_a_group() -> None:
    engines, first, second, third = await group_of(1, 2)
    task = generated(engines, 0, 1)
    await until(lambda: len(first.groups) == 2)
    first.die()
    await until(lambda: len(second.groups) == 2)
    second.finish(0)
    await asyncio.sleep(0.01)
    second.die()
    await until(lambda: len(third.groups) == 2)
    third.die()
    with pytest.raises(WorkerLost, match="rollouts: rollout rank 0 died"):
        await finished(task)
    assert engines.replaced == [0, 0]


async def test_the_only_engine_lost_twice_at_the_same_groups_in_flight_ends_the_run() -> None:
    engines, first, second, third = await group_of(1, 2, samples=4)
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: len(first.groups) == 2)
    engines.may_start.clear()
    first.die()
    await asyncio.sleep(0.01)
    await engines.cancel([request(1)])
    engines.may_start.set()
    for engine in (second, third):
        await until(lambda at=engine: at.groups)
        assert list(engine.groups) == [0], "the other one is cancelled"
        engine.die()
    with pytest.raises(WorkerLost):
        await finished(tasks[0])
    assert await tasks[1] is None
    assert engines.replaced == [0, 0], "other groups at the second loss, the same at the third"


async def test_requests_in_flight_go_to_another_engine_before_those_that_wait() -> None:
    engines, first, other, successor = await group_of(2, 1)
    engines.may_start.clear()
    tasks = [asked(engines, group_id) for group_id in range(4)]
    await until(lambda: first.groups and other.groups)
    await asyncio.sleep(0.01)
    first.die()
    await asyncio.sleep(0.01)
    other.finish(1)
    await until(lambda: 0 in other.groups)
    assert list(other.groups) == [1, 0]
    engines.may_start.set()
    await until(lambda: 2 in successor.groups)
    assert successor.calls[:3] == LOADED
    other.finish(0)
    await until(lambda: 3 in other.groups)
    other.finish(3)
    successor.finish(2)
    groups = [await finished(task) for task in tasks]
    assert [group.request.group_id for group in groups] == [0, 1, 2, 3]
    assert engines.replaced == [0]


async def test_requests_of_the_only_engine_wait_for_its_successor_or_for_its_failure() -> None:
    engines, first, successor = await group_of(1, 1, samples=4)
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: len(first.groups) == 2)
    first.die()
    await until(lambda: len(successor.groups) == 2)
    assert engines.replaced == [0], "both requests noticed the loss"
    successor.finish(0, 1)
    assert None not in [await task for task in tasks]
    tasks = [asked(engines, 3), asked(engines, 4)]
    await until(lambda: {3, 4} <= successor.groups.keys())
    successor.die()
    for task in (*tasks, asked(engines, 5)):
        with pytest.raises(RunError, match=r"rank 0 died\..*successor could not be started: no room"):
            await finished(task)
    with pytest.raises(RunError, match="no room"):
        await engines.update_weights(manifest(2))


@pytest.mark.parametrize("ask", [asked, generated])
async def test_an_engine_that_finishes_nothing_is_replaced(ask: Any) -> None:
    engines, _, successor = await group_of(1, 1, deadline_s=0.2)
    task = ask(engines, 0)
    await until(lambda: 0 in successor.groups)
    successor.finish(0)
    assert await finished(task)


@pytest.mark.parametrize(
    ("logprob", "checksum", "message"),
    [
        (-2.0, "sum 1", "weight sync to version 1: rollout engine 0 computes different log-probabilities"),
        (-1.0, "other", "checksum other; the policy published version 1 with sum 1"),
    ],
)
async def test_a_successor_with_other_weights_answers_nothing(logprob: float, checksum: str, message: str) -> None:
    engines, first, _, wrong = await group_of(2, 1)
    wrong.logprob = logprob
    wrong.loads = lambda version: SyncReceipt(version=version, checksum=checksum)
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: engines.replaced)
    with pytest.raises(RunError, match=message):
        await engines.working(0)
    assert not wrong.groups
    task.cancel()


async def test_a_successor_waits_for_a_publication_that_has_begun() -> None:
    engines, first, other, successor = await group_of(2, 1)
    assert engines._dispatch is None
    first.is_dead = True
    await update(engines, 2)  # the other engines get the new weights despite the loss
    assert other.calls == ["load 2"]
    await until(lambda: successor.calls == ["open"])
    await asyncio.sleep(0.01)
    assert successor.calls == ["open"], "the policy's log-probabilities are not known yet"
    assert await engines.prove(policy_probe(2)) == 0.0
    assert successor.calls == ["open", "load 2", "probe", "probe"]  # the successor's proof, and the proof of the sync


async def test_a_sync_waits_until_a_successor_has_read_the_weights() -> None:
    engines, first, successor = await group_of(1, 1)
    loading = Future[Any]()
    successor.loads = lambda version: loading
    first.is_dead = True
    task = asked(engines, 0)
    await until(lambda: "load 1" in successor.calls)
    withdrawn = asyncio.create_task(engines.withdraw_weights())
    await asyncio.sleep(0.01)
    assert not withdrawn.done(), "the policy would overwrite what the successor reads"
    loading.set_result(SyncReceipt(version=1, checksum="sum 1"))
    await finished(withdrawn)
    task.cancel()


async def test_a_successor_waits_for_a_repeated_publication_when_the_published_memory_is_gone() -> None:
    engines, first, other, successor = await group_of(2, 1)
    loads, successor.loads = successor.loads, lambda version: GONE
    first.is_dead = True
    task = asked(engines, 0)
    await asyncio.wait_for(engines.weights_are_missing(), DEADLINE_S)
    successor.loads = loads
    engines.offer_weights(manifest(2))
    await asyncio.sleep(0.01)
    assert successor.calls == ["open", "load 1"], "the last probe is of other weights"
    engines.offer_weights(manifest(1))
    await until(lambda: "probe" in successor.calls and not engines._rebuilds)
    assert successor.calls == ["open", "load 1", "load 1", "probe"]
    assert "load 1" not in other.calls, "no sync"
    task.cancel()


async def test_a_successor_that_never_finds_what_is_published_ends_the_run() -> None:
    engines, first, blind = await group_of(1, 1)
    blind.loads = lambda version: GONE
    first.is_dead = True

    async def publish() -> None:
        while True:
            await engines.weights_are_missing()
            engines.offer_weights(manifest(1))

    publishing = asyncio.create_task(publish())
    with pytest.raises(RunError, match=r"could not be started: weight sync: .* FileNotFoundError: /runs/adapter"):
        await finished(asked(engines, 0))
    publishing.cancel()
    assert blind.calls == ["open", "load 1", "load 1", "load 1"]


@pytest.mark.parametrize("found_by", ["other", "successor 0"])
async def test_a_group_whose_tokens_are_lost_comes_from_the_store_by_any_engine_that_works(found_by: str) -> None:
    """The other engine works, or is lost too and comes back first. The first engine waits for room without a limit."""
    engines, first, other, successor = await group_of(2, 1)
    infos: Any = (SimpleNamespace(num_response_tokens=4),)
    other.store = successor.store = {3: infos}
    if found_by == "other":
        first.is_dead = True
        engines.may_start.clear()
    else:
        engines._rebuild(0, cast(Any, asyncio.Event().wait()))
        await find_dead(engines, other)
    lost = CompletedGroup(request=request(3), rollouts=cast(Any, "lost"), infos=infos)
    found = await asyncio.wait_for(engines.restored(lost, SAMPLING), DEADLINE_S)
    assert (found.request, found.infos, found.rollouts) == (lost.request, lost.infos, f"tokens from {found_by}")
    await engines.give_up_rebuilds()


async def test_memory_is_measured_at_whatever_moment_the_only_engine_comes_back() -> None:
    for moment in range(40):
        engines, first, _ = await group_of(1, 1)
        engines.may_start.clear()
        await find_dead(engines, first)
        engines.may_start.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        report = await asyncio.wait_for(engines.memory(), DEADLINE_S)
        assert report == MemoryReport(rss_gib=2.0, gpu_gib=None)


async def test_nothing_of_a_rebuild_goes_on_after_the_end() -> None:
    engines, first, other = await group_of(2, 0)
    engines.may_start.clear()
    ends: list[str] = []

    @contextmanager
    def span(*names: str) -> Iterator[None]:
        try:
            yield
        finally:
            ends.append(" ".join(names))

    engines.supervisor.record.timeline = SimpleNamespace(span=span)
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: engines.replaced)
    engines.processes = SimpleNamespace(end=lambda: None)
    async with ending_rebuilds([engines]):
        pass
    assert ends == ["recovery rollout"], "the file of the timeline is closed after the end"
    await engines.stop()
    assert other.calls[-1] == "shutdown"
    task.cancel()


async def test_an_engine_that_does_not_end_is_told_of_with_the_limit_that_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_group, "END_WITHIN_S", 0.05)
    engine = Engine("stuck")
    engine.ends = Future[Any]
    with pytest.raises(RunError, match=r"stop: .* did not answer within 0 s \(the limit of an orderly end\)\. "):
        await Engines(engine).stop()


async def test_in_flight_a_sync_does_not_wait_for_a_lost_engine() -> None:
    engines, first, other, *successors = await group_of(2, 2)
    engines.may_start.clear()
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: 0 in other.groups)
    await synced(engines, 2)
    other.die()
    await update(engines, 3)
    assert await engines.prove(policy_probe(3)) is None, "no engine works"
    engines.may_start.set()
    await until(lambda: any(engine.groups for engine in successors))
    assert all(engine.calls[:3] == ["open", "load 3", "probe"] for engine in successors if engine.groups)
    task.cancel()


async def test_a_successor_joins_the_next_broadcast_and_others_answer_its_share_until_then() -> None:
    engines, first, other, successor = await group_of(2, 1, policy := Policy())
    task = generated(engines, 0, 1, 2)
    await until(lambda: len(first.groups) == 2 and len(other.groups) == 1)
    first.die()
    await until(lambda: engines._unsynced)
    assert list(other.groups) == [1]
    other.finish(1)
    await until(lambda: len(other.groups) == 3)
    other.finish(0, 2)
    assert sorted(group.request.group_id for group in await finished(task)) == [0, 1, 2]
    assert other.calls == ["hold", 1, "release 1", "hold", 0, 2, "release 2"]
    assert policy.meetings == [2]
    assert not successor.groups
    await synced(engines, 2)
    assert policy.meetings == [2, 2], "all members meet again"
    await engines.working(0)
    again = generated(engines, 3, 4)
    await until(lambda: successor.groups and 4 in other.groups)
    successor.finish(3)
    other.finish(4)
    assert len(await again) == 2


async def test_a_successor_waits_for_the_next_broadcast_as_long_as_the_run_works() -> None:
    engines, first, _, _ = await group_of(2, 1, Policy())
    await find_dead(engines, first)
    engines.deadline_s = 0.3
    await until(lambda: engines._unsynced)
    await within(asyncio.sleep(0.6), DEADLINE_S)  # a step is longer than the limit of a call
    assert engines._unsynced, "it still waits"
    with pytest.raises(RunError, match=r"for the next broadcast of weights.*\(cluster.call_timeout_s\)"):
        await asyncio.wait_for(engines.working(0), DEADLINE_S)


async def test_a_proof_is_only_of_the_engine_that_gave_it() -> None:
    engines, first, other, *successors = await group_of(2, 2, Policy())
    await find_dead(engines, first)
    await until(lambda: engines._unsynced)
    await update(engines, 2)
    slow = Future[Any]()
    other.probes = lambda: slow
    proving = asyncio.create_task(engines.prove(policy_probe(2)))
    await until(lambda: "probe" in successors[0].calls)
    await asyncio.sleep(0.01)
    await find_dead(engines, successors[0])
    await until(lambda: engines.handles[0] is successors[1] and engines._unsynced)
    slow.set_result([-1.0, -1.0])
    await finished(proving)
    assert 0 in engines._rebuilds, "it has no weights"
    await engines.give_up_rebuilds()


async def test_new_ranks_of_the_policy_and_a_broadcast_meet_the_engines_that_work() -> None:
    engines, first, _, successor = await group_of(2, 1, policy := Policy())
    engines.may_start.clear()
    first.is_dead = True  # unnoticed: engine and policy were on the same node
    await cast(Any, policy).reconnect()
    assert policy.meetings == [2, 1]
    engines.may_start.set()
    await until(lambda: engines._unsynced)
    successor.is_dead = True
    await synced(engines, 3)
    with pytest.raises(RunError, match="no room"):  # no room for the successor's successor
        await engines.working(0)


@pytest.mark.parametrize("when", ["during its call", "before its call", "before its call, and has a successor"])
async def test_a_loss_in_a_broadcast_is_raised_although_the_other_members_notice_nothing(when: str) -> None:
    """With nccl the policy and the remaining engines would wait for the lost engine without end."""
    engines, first, other, _ = await group_of(2, 1, Policy())
    dying, has_successor = Future[Any](), "successor" in when
    first.loads, other.loads = lambda version: dying, lambda version: Future[Any]()
    if not has_successor:
        engines.may_start.clear()
    await engines.withdraw_weights()
    if "before" in when:
        await find_dead(engines, first)
        await until(lambda: (engines.handles[0] is not first) == has_successor)
    updating = asyncio.create_task(engines.update_weights(manifest(2)))
    if "during" in when:
        await until(lambda: "load 2" in other.calls)
        dying.set_exception(ActorDiedError())
    with pytest.raises(WorkerLost, match="rollout rank 0"):
        await finished(updating)
    await engines.give_up_rebuilds()


async def test_the_loss_of_an_environments_process_is_named_and_its_engine_replaced() -> None:
    engines, first, successor = await group_of(1, 1)
    tasks = [asked(engines, 0), generated(engines, 1)]
    await until(lambda: len(first.groups) == 2)
    lost = ChildLost("the environment's process is gone", kind="hung")
    for group_id in (0, 1):
        first.groups[group_id].set_exception(RayTaskError("answer", "", pickle.loads(pickle.dumps(lost))))
    await until(lambda: len(successor.groups) == 2)
    successor.finish(0, 1)
    answered, (of_batch,) = [await finished(task) for task in tasks]
    assert (answered.rollouts, of_batch.rollouts) == ("tokens from successor 0", "tokens from successor 0")
    assert engines.replaced == [0]
    error = await explain(RayTaskError("answer", "", lost), role="rollout", rank=1, stage="rollouts")
    assert isinstance(error, WorkerLost)
    assert (error.role, error.rank, error.kind) == ("rollout", 1, "hung")
    assert error.reason == "rollouts: rollout rank 1 cannot work any more: the environment's process is gone"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not synced", r"rank 0 died\..*not started again, because no weights have been sent.*--resume auto"),
        ("synced once", r"rank 0 died\..*not started again, because it shares GPUs with.*--resume auto"),
        ("outside of a run", "rank 0 died"),
        ("the last of a broadcast", "rank 0 died"),
    ],
)
async def test_an_engine_that_cannot_be_replaced_says_why(case: str, message: str) -> None:
    engines, first, _ = await group_of(1, 1, Policy() if "broadcast" in case else None)
    if case == "outside of a run":
        engines.supervisor = None
    elif "broadcast" not in case:
        engines.is_replaceable = engines.gives_published = False
        engines._manifest = engines._manifest if case == "synced once" else None
    task = generated(engines, 0)
    await until(lambda: first.groups)
    first.die()
    with pytest.raises(RunError, match=message):
        await finished(task)
    assert engines.replaced == []
