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


def generated(engines: Engines, *group_ids: int) -> asyncio.Task[list[CompletedGroup]]:
    async def groups() -> list[CompletedGroup]:
        requests = [request(group_id) for group_id in group_ids]
        return [group async for group in engines.generate(requests, SAMPLING, version=1)]

    return asyncio.create_task(groups())


async def test_a_successor_gets_the_whole_share_and_no_group_comes_twice() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other, successors=(successor,)))
    task = generated(engines, 0, 1, 2, 3, 4)
    await until(lambda: len(first.groups) == 3 and len(other.groups) == 2)
    first.finish(2)
    await asyncio.sleep(0.01)
    first.die()
    other.finish(1, 3)
    await until(lambda: len(successor.groups) == 3)
    successor.finish(0, 2, 4)
    groups = await asyncio.wait_for(task, DEADLINE_S)
    assert sorted(group.request.group_id for group in groups) == [0, 1, 2, 3, 4]
    assert {group.request.group_id: group.rollouts for group in groups}[2] == "tokens from first"
    assert first.calls == ["hold", 0, 2, 4, "release 3"]
    assert successor.calls == ["open", "load 1", "probe", *first.calls]
    assert other.calls == ["hold", 1, 3, "release 2"]
    assert engines.replaced == [0]


async def test_a_successor_of_a_reused_engine_keeps_its_groups_in_the_folder_of_the_present_run() -> None:
    first, successor = Engine("first"), Engine("successor")
    engines = await synced(Engines(first, successors=(successor,)))
    assert await engines.renew(Path("second_run"))
    await synced(engines)
    task = generated(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: successor.groups)
    successor.finish(0)
    await asyncio.wait_for(task, DEADLINE_S)
    assert successor.calls[:4] == ["renew second_run", "open", "load 1", "probe"]


async def test_a_group_that_was_cancelled_after_its_batch_is_answered_in_another_batch_with_its_id() -> None:
    engine = Engine("first")
    engines = await synced(Engines(engine))
    for _ in range(2):
        task = generated(engines, 0, 1)
        await until(lambda: len(engine.groups) == 2)
        engine.finish(0, 1)
        groups = await asyncio.wait_for(task, DEADLINE_S)
        assert sorted(group.request.group_id for group in groups) == [0, 1]
        engine.groups.clear()
        await engines.cancel([request(0), request(1)])


async def test_a_share_with_nothing_left_but_cancelled_groups_is_not_asked_again() -> None:
    first, successor = Engine("first"), Engine("successor")
    engines = await synced(Engines(first, successors=(successor,)))
    engines.may_start.clear()
    task = generated(engines, 0, 1)
    await until(lambda: len(first.groups) == 2)
    first.finish(0)
    await asyncio.sleep(0.01)
    await engines.cancel([request(1)])
    first.die()
    assert [group.request.group_id for group in await asyncio.wait_for(task, DEADLINE_S)] == [0]
    again = generated(engines, 2)
    await asyncio.sleep(0.01)
    await engines.cancel([request(2)])  # while it waits for the successor
    engines.may_start.set()
    assert await asyncio.wait_for(again, DEADLINE_S) == []
    assert successor.calls == ["open", "load 1", "probe"]


async def test_an_engine_lost_twice_at_the_same_batch_ends_the_run_unless_it_finished_a_group() -> None:
    first, second, third = Engine("first"), Engine("second"), Engine("third")
    engines = await synced(Engines(first, successors=(second, third)))
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
        await asyncio.wait_for(task, DEADLINE_S)
    assert engines.replaced == [0, 0]


async def test_the_only_engine_lost_twice_at_the_same_groups_in_flight_ends_the_run() -> None:
    first, second, third = Engine("first", samples=4), Engine("second", samples=4), Engine("third", samples=4)
    engines = await synced(Engines(first, successors=(second, third)))
    tasks = [asked(engines, 0), asked(engines, 1)]
    await until(lambda: len(first.groups) == 2)
    engines.may_start.clear()
    first.die()
    await asyncio.sleep(0.01)
    await engines.cancel([request(1)])
    engines.may_start.set()
    await until(lambda: second.groups)
    second.die()
    await until(lambda: third.groups)
    third.die()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(tasks[0], DEADLINE_S)
    assert await tasks[1] is None
    assert engines.replaced == [0, 0], "other groups at the second loss, the same at the third"


async def test_engines_outside_of_a_run_are_not_replaced() -> None:
    engine = Engine("frozen")
    engines = Engines(engine)
    engines.supervisor = None
    task = generated(engines, 0)
    await until(lambda: engine.groups)
    engine.die()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(task, DEADLINE_S)
    assert engines.replaced == []


async def test_requests_in_flight_go_to_another_engine_before_those_that_wait() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other, successors=(successor,)))
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
    assert successor.calls[:3] == ["open", "load 1", "probe"]
    other.finish(0)
    await until(lambda: 3 in other.groups)
    other.finish(3)
    successor.finish(2)
    groups = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
    assert [group.request.group_id for group in groups if group is not None] == [0, 1, 2, 3]
    assert engines.replaced == [0]


async def test_requests_of_the_only_engine_wait_for_its_successor_or_for_its_failure() -> None:
    first, successor = Engine("first", samples=4), Engine("successor", samples=4)
    engines = await synced(Engines(first, successors=(successor,)))
    one, two = asked(engines, 0), asked(engines, 1)
    await until(lambda: len(first.groups) == 2)
    first.die()
    await until(lambda: len(successor.groups) == 2)
    assert engines.replaced == [0], "both requests noticed the loss"
    successor.finish(0, 1)
    assert await one is not None
    assert await two is not None
    three, four = asked(engines, 3), asked(engines, 4)
    await until(lambda: {3, 4} <= successor.groups.keys())
    successor.die()
    for task in (three, four, asked(engines, 5)):
        with pytest.raises(RunError, match=r"rank 0 died\..*successor could not be started: no room"):
            await asyncio.wait_for(task, DEADLINE_S)
    with pytest.raises(RunError, match="no room"):
        await engines.update_weights(manifest(2))


async def test_an_engine_that_finishes_nothing_is_replaced() -> None:
    for ask in (asked, generated):
        stuck, successor = Engine("stuck"), Engine("successor")
        engines = await synced(Engines(stuck, successors=(successor,), deadline_s=0.2))
        task: asyncio.Task[Any] = ask(engines, 0)
        await until(lambda at=successor: 0 in at.groups)
        successor.finish(0)
        assert await asyncio.wait_for(task, DEADLINE_S)


async def test_a_cancelled_request_of_a_lost_engine_is_not_asked_again() -> None:
    first, successor = Engine("first"), Engine("successor")
    engines = await synced(Engines(first, successors=(successor,)))
    engines.may_start.clear()
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await asyncio.sleep(0.01)
    await engines.cancel([request(0)])
    assert await asyncio.wait_for(task, DEADLINE_S) is None
    engines.may_start.set()
    await until(lambda: "probe" in successor.calls)
    assert not successor.groups


async def test_a_successor_with_other_weights_answers_nothing() -> None:
    wrong = Engine("wrong", logprob=-2.0)
    engines = await synced(Engines(Engine("first"), Engine("other"), successors=(wrong,)))
    task = asked(engines, 0)
    await until(lambda: cast(Any, engines.handles[0]).groups)
    cast(Any, engines.handles[0]).die()
    await until(lambda: engines.replaced)
    with pytest.raises(RunError, match="weight sync to version 1: rollout engine 0 gives other log-probabilities"):
        await engines.working(0)
    assert not wrong.groups
    task.cancel()

    damaged = Engine("damaged")
    damaged.loads = lambda version: SyncReceipt(version=version, checksum="other")
    engines = await synced(Engines(Engine("first"), successors=(damaged,)))
    cast(Any, engines.handles[0]).is_dead = True
    with pytest.raises(RunError, match="checksum other; the policy published version 1 with sum 1"):
        await asyncio.wait_for(asked(engines, 0), DEADLINE_S)


async def test_a_successor_waits_for_a_publication_that_has_begun() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other, successors=(successor,)))
    assert engines._dispatch is None
    await engines.withdraw_weights()
    first.is_dead = True
    await engines.update_weights(manifest(2))  # the loss of one does not keep the others from the new weights
    assert other.calls == ["load 2"]
    await until(lambda: successor.calls == ["open"])
    await asyncio.sleep(0.01)
    assert successor.calls == ["open"], "the policy's log-probabilities are not known yet"
    assert await engines.prove(policy_probe(2)) == 0.0
    assert successor.calls == ["open", "load 2", "probe", "probe"]  # its own proof, and that of the sync


async def test_a_sync_waits_until_a_successor_has_read_the_weights() -> None:
    first, successor, loading = Engine("first"), Engine("successor"), Future[Any]()
    engines = await synced(Engines(first, successors=(successor,)))
    successor.loads = lambda version: loading
    first.is_dead = True
    task = asked(engines, 0)
    await until(lambda: "load 1" in successor.calls)
    withdrawn = asyncio.create_task(engines.withdraw_weights())
    await asyncio.sleep(0.01)
    assert not withdrawn.done(), "the policy would overwrite what the successor reads"
    loading.set_result(SyncReceipt(version=1, checksum="sum 1"))
    await asyncio.wait_for(withdrawn, DEADLINE_S)
    task.cancel()


async def test_a_successor_waits_for_the_policy_when_the_published_memory_is_gone() -> None:
    first, successor = Engine("first"), Engine("successor")
    engines = await synced(Engines(first, successors=(successor,)))
    gone = RayTaskError("update_weights", "", FileNotFoundError("/proc/1/fd/2"))
    successor.loads = lambda version: gone
    first.is_dead = True
    task = asked(engines, 0)
    await until(lambda: "load 1" in successor.calls and engines._published is None)
    successor.loads = lambda version: SyncReceipt(version=version, checksum=f"sum {version}")
    await engines.withdraw_weights()
    await engines.update_weights(manifest(1))
    await engines.prove(policy_probe(1))
    await until(lambda: 0 in successor.groups)
    assert successor.calls == ["open", "load 1", "load 1", "probe", 0]
    task.cancel()


async def test_a_repeated_publication_reaches_a_successor_without_a_sync() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other, successors=(successor,)))
    successor.loads = lambda version: RayTaskError("update_weights", "", FileNotFoundError("/proc/1/fd/2"))
    first.is_dead = True
    task = asked(engines, 0)
    await asyncio.wait_for(engines.weights_are_missing(), DEADLINE_S)
    successor.loads = lambda version: SyncReceipt(version=version, checksum=f"sum {version}")
    engines.offer_weights(manifest(2))
    await asyncio.sleep(0.01)
    assert successor.calls == ["open", "load 1"], "the last probe is of other weights"
    engines.offer_weights(manifest(1))
    await until(lambda: "probe" in successor.calls and not engines._rebuilds)
    assert successor.calls == ["open", "load 1", "load 1", "probe"]
    assert "load 1" not in other.calls
    task.cancel()


async def test_a_successor_that_never_finds_what_is_published_ends_the_run() -> None:
    first, blind = Engine("first"), Engine("blind")
    engines = await synced(Engines(first, successors=(blind,)))
    blind.loads = lambda version: RayTaskError("update_weights", "", FileNotFoundError("/runs/adapter"))
    first.is_dead = True

    async def publish() -> None:
        while True:
            await engines.weights_are_missing()
            engines.offer_weights(manifest(1))

    publishing = asyncio.create_task(publish())
    with pytest.raises(RunError, match=r"could not be started: weight sync: .* FileNotFoundError: /runs/adapter"):
        await asyncio.wait_for(asked(engines, 0), 5.0)
    publishing.cancel()
    assert blind.calls == ["open", "load 1", "load 1", "load 1"]


async def test_a_group_whose_tokens_are_lost_comes_from_the_store_by_any_engine_that_works() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other, successors=(successor,)))
    other.store = {3: (SimpleNamespace(num_response_tokens=4),)}
    first.is_dead = True
    engines.may_start.clear()
    infos: Any = (SimpleNamespace(num_response_tokens=4),)
    tokens: Any = "lost"
    lost = CompletedGroup(request=request(3), rollouts=tokens, infos=infos)
    found = await asyncio.wait_for(engines.restored(lost, SAMPLING), DEADLINE_S)
    assert (found.request, found.infos, found.rollouts) == (lost.request, lost.infos, "tokens from other")
    await engines.give_up_rebuilds()


async def test_memory_is_measured_at_whatever_moment_the_only_engine_comes_back() -> None:
    for moment in range(40):
        first, successor = Engine("first"), Engine("successor")
        engines = await synced(Engines(first, successors=(successor,)))
        engines.may_start.clear()
        first.is_dead = True
        await engines.cancel([])  # a call that finds it dead
        engines.may_start.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        report = await asyncio.wait_for(engines.memory(), DEADLINE_S)
        assert report == MemoryReport(rss_gib=2.0, gpu_gib=None)


async def test_lost_tokens_are_asked_from_the_first_engine_that_comes_back() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await synced(Engines(first, other))
    infos: Any = (SimpleNamespace(num_response_tokens=4),)
    successor.store = {3: infos}
    engines._rebuild(0, cast(Any, asyncio.Event().wait()))  # it waits for room, without a limit
    engines.successors = [successor]
    other.is_dead = True
    await engines.cancel([])
    lost = CompletedGroup(request=request(3), rollouts=cast(Any, "lost"), infos=infos)
    found = await asyncio.wait_for(engines.restored(lost, SAMPLING), 5.0)
    assert found.rollouts == "tokens from successor"
    await engines.give_up_rebuilds()


async def test_nothing_of_a_rebuild_goes_on_after_the_end() -> None:
    first, other = Engine("first"), Engine("other")
    engines = await synced(Engines(first, other))
    engines.may_start.clear()
    ends: list[str] = []

    @contextmanager
    def span(*names: str) -> Iterator[None]:
        try:
            yield
        finally:
            ends.append(" ".join(names))

    assert engines.supervisor is not None
    engines.supervisor.record.timeline = cast(Any, SimpleNamespace(span=span))
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: engines.replaced)
    engines.processes = cast(Any, SimpleNamespace(end=lambda: None))
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
    first, other, successors = Engine("first"), Engine("other"), (Engine("one"), Engine("two"))
    engines = await synced(Engines(first, other, successors=successors))
    engines.may_start.clear()
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    await until(lambda: 0 in other.groups)
    await synced(engines, 2)
    other.die()
    await engines.withdraw_weights()
    await engines.update_weights(manifest(3))
    assert await engines.prove(policy_probe(3)) is None, "no engine works"
    engines.may_start.set()
    await until(lambda: any(engine.groups for engine in successors))
    assert all(engine.calls[:3] == ["open", "load 3", "probe"] for engine in successors if engine.groups)
    task.cancel()


async def broadcasting(policy: Policy, *engines: Engine, successors: tuple[Engine, ...] = ()) -> Engines:
    made = Engines(*engines, successors=successors)
    made.sync = WeightSync(method="gloo", why="")
    await made.connect(cast(Any, policy), adapter=None)
    return await synced(made)


async def test_a_successor_joins_the_next_broadcast_and_others_answer_its_share_until_then() -> None:
    policy, first, other, successor = Policy(), Engine("first"), Engine("other"), Engine("successor")
    engines = await broadcasting(policy, first, other, successors=(successor,))
    task = generated(engines, 0, 1, 2)
    await until(lambda: len(first.groups) == 2 and len(other.groups) == 1)
    first.die()
    await until(lambda: engines._unsynced)
    assert list(other.groups) == [1]
    other.finish(1)
    await until(lambda: len(other.groups) == 3)
    other.finish(0, 2)
    groups = await asyncio.wait_for(task, DEADLINE_S)
    assert sorted(group.request.group_id for group in groups) == [0, 1, 2]
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
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await broadcasting(Policy(), first, other, successors=(successor,))
    first.is_dead = True
    await engines.cancel([])  # a call that finds it dead
    engines.deadline_s = 0.5
    await until(lambda: engines._unsynced)
    await within(asyncio.sleep(1.0), DEADLINE_S)  # a step is longer than the limit of a call
    engines.deadline_s = DEADLINE_S
    await synced(engines, 2)
    await engines.working(0)


async def test_a_successor_does_not_wait_for_a_broadcast_of_a_run_that_does_nothing() -> None:
    first, other, successor = Engine("first"), Engine("other"), Engine("successor")
    engines = await broadcasting(Policy(), first, other, successors=(successor,))
    first.is_dead = True
    await engines.cancel([])
    engines.deadline_s = 0.5
    with pytest.raises(RunError, match=r"for the next broadcast of weights.*\(cluster.call_timeout_s\)"):
        await asyncio.wait_for(engines.working(0), DEADLINE_S)


async def test_new_ranks_of_the_policy_meet_the_engines_that_work() -> None:
    policy, first, other = Policy(), Engine("first"), Engine("other")
    engines = await broadcasting(policy, first, other, successors=(Engine("successor"),))
    engines.may_start.clear()
    first.is_dead = True  # and nobody has noticed: both were on the same node
    await cast(Any, policy).reconnect()
    assert policy.meetings == [2, 1]
    await engines.give_up_rebuilds()


async def test_a_proof_is_only_of_the_engine_that_gave_it() -> None:
    first, other, successors = Engine("first"), Engine("other"), (Engine("one"), Engine("two"))
    engines = await broadcasting(Policy(), first, other, successors=successors)
    first.is_dead = True
    await engines.cancel([])
    await until(lambda: engines._unsynced)
    await engines.withdraw_weights()
    await engines.update_weights(manifest(2))
    slow = Future[Any]()
    other.probes = lambda: slow
    proving = asyncio.create_task(engines.prove(policy_probe(2)))
    await until(lambda: "probe" in successors[0].calls)
    await asyncio.sleep(0.01)
    successors[0].die()
    await engines.cancel([])
    await until(lambda: engines.handles[0] is successors[1] and engines._unsynced)
    slow.set_result([-1.0, -1.0])
    await asyncio.wait_for(proving, DEADLINE_S)
    assert 0 in engines._rebuilds, "it has no weights"
    await engines.give_up_rebuilds()


async def test_a_broadcast_goes_to_the_engines_that_work() -> None:
    policy, first, other, successor = Policy(), Engine("first"), Engine("other"), Engine("successor")
    engines = await broadcasting(policy, first, other, successors=(successor,))
    engines.may_start.clear()
    first.is_dead = True  # and nobody has noticed
    await synced(engines, 2)
    assert policy.meetings == [2, 1]
    engines.may_start.set()
    await until(lambda: engines._unsynced)
    successor.is_dead = True
    await synced(engines, 3)
    with pytest.raises(RunError, match="no room"):  # for the successor of the successor
        await engines.working(0)


async def test_a_loss_during_a_broadcast_is_raised_although_the_other_members_notice_nothing() -> None:
    """With nccl the policy and the remaining engines would wait for the lost engine without end."""
    first, other = Engine("first"), Engine("other")
    engines = await broadcasting(Policy(), first, other, successors=(Engine("successor"),))
    dying, waiting = Future[Any](), Future[Any]()
    first.loads, other.loads = lambda version: dying, lambda version: waiting
    await engines.withdraw_weights()
    update = asyncio.create_task(engines.update_weights(manifest(2)))
    await until(lambda: "load 2" in other.calls)
    dying.set_exception(ActorDiedError())
    with pytest.raises(WorkerLost, match="rollout rank 0"):
        await asyncio.wait_for(update, DEADLINE_S)


@pytest.mark.parametrize("has_successor", [False, True])
async def test_an_engine_lost_before_its_call_in_a_broadcast_is_raised_too(has_successor: bool) -> None:
    first, other = Engine("first"), Engine("other")
    engines = await broadcasting(Policy(), first, other, successors=(Engine("successor"),))
    if not has_successor:
        engines.may_start.clear()
    await engines.withdraw_weights()
    member, first.is_dead = engines.handles[0], True
    await engines.cancel([])  # a call that finds it dead
    await until(lambda: (engines.handles[0] is not member) == has_successor)
    with pytest.raises(WorkerLost, match="rollout rank 0"):
        await asyncio.wait_for(engines.update_weights(manifest(2)), DEADLINE_S)
    await engines.give_up_rebuilds()


async def test_the_loss_of_the_last_engine_ends_a_run_with_broadcasts() -> None:
    first = Engine("first")
    engines = await broadcasting(Policy(), first, successors=(Engine("successor"),))
    task = asked(engines, 0)
    await until(lambda: first.groups)
    first.die()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(task, DEADLINE_S)


async def test_an_engine_that_lost_the_process_of_its_environment_is_replaced() -> None:
    first, successor = Engine("first"), Engine("successor")
    engines = await synced(Engines(first, successors=(successor,)))
    tasks = [asked(engines, 0), generated(engines, 1)]
    await until(lambda: len(first.groups) == 2)
    lost = ChildLost("the environment's process is gone", kind="hung")
    for group_id in (0, 1):
        first.groups[group_id].set_exception(RayTaskError("answer", "", pickle.loads(pickle.dumps(lost))))
    await until(lambda: len(successor.groups) == 2)
    successor.finish(0, 1)
    answered, (of_batch,) = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
    assert (answered.rollouts, of_batch.rollouts) == ("tokens from successor", "tokens from successor")
    assert engines.replaced == [0]


async def test_the_loss_of_an_environment_says_what_was_lost() -> None:
    lost = RayTaskError("answer", "", ChildLost("the environment's process did not fork within 60 s", kind="hung"))
    error = await explain(lost, role="rollout", rank=1, stage="rollouts")
    assert isinstance(error, WorkerLost)
    assert (error.role, error.rank, error.kind) == ("rollout", 1, "hung")
    assert error.reason == (
        "rollouts: rollout rank 1 cannot work any more: the environment's process did not fork within 60 s"
    )


@pytest.mark.parametrize(("is_synced", "reason"), [(False, "no weights have been sent"), (True, "it shares GPUs with")])
async def test_an_engine_that_cannot_be_replaced_says_why(is_synced: bool, reason: str) -> None:
    engines = Engines(Engine("first"), successors=(Engine("successor"),))
    engines.is_replaceable = engines.gives_published = False
    if is_synced:
        await synced(engines)
    task = generated(engines, 0)
    await until(lambda: cast(Any, engines.handles[0]).groups)
    cast(Any, engines.handles[0]).die()
    with pytest.raises(RunError, match=rf"rank 0 died\..*not started again, because {reason}.*--resume auto"):
        await asyncio.wait_for(task, DEADLINE_S)
    assert engines.replaced == []
