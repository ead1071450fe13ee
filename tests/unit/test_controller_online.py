"""rlhf/controller/online.py trains, stores and publishes a step in the right order. Roles record calls.

tests/curves/test_losses_of_ranks.py loses ranks and tokens of a whole run in this process.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.controller.step_attempt import StepAttempt
from rlhf.controller.streamed_learning import Arrivals, StreamedAdvantageLearning
from rlhf.errors import ResultsLost, RunError, WorkerLost
from rlhf.rollouts.records.spool import group_path, write_group
from rlhf.tracking.metrics.reductions import Max
from tests.fakes.groups import INFO, REQUEST, ROLLOUTS, SAMPLING
from tests.fakes.roles import FakeEngines, FakePolicy, FakeReference, FakeTeacher, FakeTrained

LEARNING: dict[str, Any] = {
    "record": SimpleNamespace(apart=lambda *_, **__: nullcontext()),
    "config": SimpleNamespace(tracking=SimpleNamespace(samples_per_step=0)),
    "renews_reference": lambda step: False,
}


class Ends:
    """The engines' and the policy's ends of a publication. Calls are recorded, and engines may miss the weights."""

    gives_published = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.missing = asyncio.Event()
        self.newest = 2  # step of the ranks' newest snapshot
        self.is_lost = False  # the policy's first rank, noticed in the next call

    def _refuse_lost(self, call: str) -> None:
        if self.is_lost:
            self.calls.append(f"lost: {call}")
            raise WorkerLost("lost", role="policy", rank=0, stage="weight sync", kind="died")

    async def weights_are_missing(self) -> None:
        await self.missing.wait()

    async def withdraw_weights(self) -> None:
        self.calls.append("withdraw")

    async def publish(self, version: int) -> str:
        self._refuse_lost(f"publish {version}")
        self.calls.append(f"publish {version}")
        return f"manifest {version}"

    def offer_weights(self, manifest: str) -> None:
        self.calls.append(f"offer {manifest}")
        self.missing.clear()

    async def restart(self) -> None:
        self.is_lost = False
        self.calls.append("restart")

    async def newest_snapshot(self) -> int:
        return self.newest

    async def take_snapshot(self, step: int) -> None:
        self.calls.append(f"snapshot {step}")
        self.newest = step

    async def restore_snapshot(self, step: int) -> None:
        self._refuse_lost(f"restore {step}")
        self.calls.append(f"restore {step}")


PUBLISHED = ["withdraw", "publish 2", "offer manifest 2"]


def published(*, engines_have: int = 2, **batches: Any) -> tuple[Any, Ends]:
    """Return a controller after step 2, with policy and engines in one object. Its syncs and renewals are recorded."""

    async def during(work: Any) -> None:
        await work

    async def rebuilt(lost: WorkerLost, rebuild: Any, *, work: Any) -> None:
        await rebuild()

    async def sync(step: int) -> None:
        ends.calls.append(f"sync {step}")

    async def renew(step: int) -> None:
        ends.calls.append("renew")

    async def learn(groups: Any, step: int) -> Signals:
        ends.calls.append(f"learn {step}")
        return Signals()

    controller: Any = OnlineController.__new__(OnlineController)
    ends = Ends()
    controller.roles = SimpleNamespace(rollout=ends, policy=ends)
    controller.trained = {"policy": ends}
    controller.step, controller.trained_step, controller.is_published = 2, 2, True
    controller.scorer = SimpleNamespace(weights=(engines_have, "sum"))
    controller.record, controller.sharing, controller.sync = LEARNING["record"], frozenset(), sync
    controller.supervisor, controller.survives = SimpleNamespace(recover=rebuilt), True
    controller.batches = SimpleNamespace(during=during, **batches)
    controller.learning = SimpleNamespace(**LEARNING, learn=learn, renew_reference=renew)
    controller.attempt = None
    controller.notice = SimpleNamespace(unless_given=lambda work: work)
    return controller, ends


def attempt_at(step: int, controller: Any, *groups: str) -> StepAttempt:
    attempt = StepAttempt(step, controller.learning, controller.scorer, cast(Any, None))
    attempt.groups = cast(Any, groups)
    controller.attempt = attempt
    return attempt


@pytest.mark.parametrize("is_due", [False, True])
async def test_a_reference_is_renewed_only_when_no_role_can_need_the_old_one_again(is_due: bool) -> None:
    async def finish() -> None:
        ends.calls.append("finish")

    controller, ends = published(until_weights_may_change=finish)
    controller.learning.renews_reference = lambda step: is_due
    waits = controller.wait_for_snapshots

    async def wait_for_snapshots() -> None:
        await waits()
        ends.calls.append("wait")

    controller.wait_for_snapshots = wait_for_snapshots
    await controller._learn_and_sync(attempt_at(3, controller))
    renewal = ["wait", "renew"] if is_due else []
    assert ends.calls == ["learn 3", "snapshot 3", "finish", *renewal, "sync 3", "wait"]


async def test_weights_that_are_published_again_after_a_restart_leave_no_metrics_in_the_step() -> None:
    unused: Any = None
    record = RunRecord(folder=unused, tracker=unused, timeline=unused, progress=unused)
    controller, ends = published()

    async def sync(version: int) -> None:
        ends.calls.append(f"sync {version}")
        record.add({"weight_sync/probe_max_diff": Max(value=1.0)})

    controller.record, controller.is_published, controller.sync = record, False, sync
    await controller._publish_anew()
    assert (ends.calls, record.parts) == (["sync 2"], [])


@pytest.mark.parametrize(("in_flight", "version", "num_kept"), [(True, 0, 1), (True, 2, 3), (False, 0, 3)])
async def test_without_a_checkpoint_a_run_in_flight_takes_up_what_its_first_weights_have_sampled_alone(
    in_flight: bool, version: int, num_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In other modes the engines compare checksums of groups, and after a checkpoint the versions suffice."""
    for group_id, stored, weights in ((0, 0, "now"), (1, 0, "before"), (2, 3, "")):
        request = replace(REQUEST, group_id=group_id)
        write_group(tmp_path, request, SAMPLING, stored, ROLLOUTS, (INFO,), weights=weights)
    at_sync: list[Path] = []

    async def sync_weights(*_: Any, **__: Any) -> Any:
        return "now", {}

    async def synced(version: int) -> None:
        at_sync.extend(sorted(tmp_path.iterdir()))

    monkeypatch.setattr("rlhf.controller.online.sync_weights", sync_weights)
    controller, _ = published(synced=synced)
    controller.config = SimpleNamespace(policy=SimpleNamespace(dtype="float32"))
    controller.probe_ids, controller.other_ids, controller.in_flight = (), (), in_flight
    controller.record = SimpleNamespace(
        folder=SimpleNamespace(spool=tmp_path),
        progress=SimpleNamespace(stage=lambda _: None),
        timeline=SimpleNamespace(span=lambda *_: nullcontext()),
        add=lambda _: None,
    )
    await OnlineController.sync(controller, version)
    assert at_sync == [group_path(tmp_path, *place) for place in ((0, 0), (1, 0), (2, 3))][:num_kept]


async def test_a_restored_policy_publishes_what_the_engines_have_and_nothing_else() -> None:
    controller, ends = published(engines_have=2)
    await controller.restart_trained(2)
    assert ends.calls == ["restart", "restore 2", *PUBLISHED]
    assert controller.is_published
    controller, ends = published(engines_have=1)  # lost during the sync of step 2; the sync is repeated
    await controller.restart_trained(1)
    assert ends.calls == ["restart", "restore 2"]
    assert not controller.is_published


async def test_a_wait_for_engines_publishes_the_weights_that_a_successor_misses() -> None:
    controller, ends = published()
    answered = asyncio.get_running_loop().create_future()
    wait = asyncio.create_task(controller._with_weights(answered, controller._publish_despite_losses))
    for _ in range(2):
        ends.missing.set()
        while ends.missing.is_set():
            await asyncio.sleep(0)
    answered.set_result("batch")
    assert await wait == "batch"
    assert ends.calls == PUBLISHED * 2


async def test_a_step_is_trained_again_if_a_batch_ahead_needs_the_weights_before_it() -> None:
    sampled = asyncio.get_running_loop().create_future()  # the batch ahead

    async def finish() -> None:
        if controller.trained_step == 3 and ends.calls.count("learn 3") == 1:
            ends.newest, ends.is_lost = 2, True  # the copy of step 3 is not whole
            ends.missing.set()
        await asyncio.shield(sampled)

    def offer(manifest: str) -> None:
        Ends.offer_weights(ends, manifest)
        sampled.set_result("whole")

    controller, ends = published(until_weights_may_change=finish)
    ends.offer_weights = offer  # type: ignore[method-assign]
    attempt = attempt_at(3, controller, "group")
    attempt.begin_again = lambda: ends.calls.append("begin again")  # type: ignore[method-assign]
    learn_and_sync = controller.despite_losses(partial(controller._learn_and_sync, attempt), oldest=2)
    await asyncio.wait_for(learn_and_sync, timeout=60)
    assert ends.calls == [
        *("learn 3", "snapshot 3", "lost: restore 2", "restart", "restore 2", "begin again"),
        *(*PUBLISHED, "learn 3", "snapshot 3", "sync 3"),
    ]


def streamed(stream: Any) -> Any:
    """Return a learning with the given stream."""
    learning: Any = StreamedAdvantageLearning.__new__(StreamedAdvantageLearning)
    learning.record, learning.stream, learning.begin_again = LEARNING["record"], stream, lambda: None
    return learning


async def never(step: int) -> Any:
    await asyncio.Event().wait()


async def fail(step: int) -> Any:
    raise RunError(f"step {step} failed")


@pytest.mark.parametrize(("take", "stream"), [(fail, never), (never, fail)], ids=["rollouts", "training"])
async def test_a_failure_ends_a_streamed_step_while_the_other_side_waits(take: Any, stream: Any) -> None:
    controller, _ = published(take=take)
    controller.learning = streamed(stream)
    with pytest.raises(RunError, match="step 3 failed"):
        await asyncio.wait_for(controller._take(attempt_at(3, controller)), timeout=60)


async def test_a_streamed_step_finds_the_loss_of_the_first_rank_that_a_successor_of_an_engine_waits_for() -> None:
    groups = asyncio.get_running_loop().create_future()  # the lost engine samples all groups

    async def take(step: int) -> str:
        while "offer manifest 2" not in ends.calls:
            await asyncio.sleep(0)
        groups.set_result("arrived")
        return "batch"

    async def stream(step: int) -> float:
        await asyncio.shield(groups)
        return 2.5

    controller, ends = published(take=take)
    ends.is_lost, controller.learning = True, streamed(stream)
    attempt = attempt_at(3, controller)
    taken = asyncio.create_task(controller._take(attempt))
    ends.missing.set()
    assert await asyncio.wait_for(taken, timeout=60) == "batch"
    assert attempt.busy_s == 2.5
    assert ends.calls == ["withdraw", "lost: publish 2", "restart", "restore 2", *PUBLISHED]


async def test_lost_tokens_are_restored_and_columns_that_were_computed_from_them_are_forgotten() -> None:
    forgotten: list[Any] = []

    async def restored(groups: Any, sampling: Any) -> list[str]:
        return ["found", *groups[1:]]

    async def lose(*_: Any) -> Any:
        raise ResultsLost("the node is gone.", role="reference", rank=0, stage="reference", kind="died")

    controller, _ = published()
    controller.scorer.restored = restored
    columns, arrivals = SimpleNamespace(forget=lambda groups: forgotten.append(list(groups))), Arrivals(2)
    controller.learning.learn, controller.learning.columns = lose, columns
    attempt = attempt_at(3, controller, "lost", "whole")
    with pytest.raises(WorkerLost) as lost:
        await attempt.learn()
    assert (type(lost.value), lost.value.role, lost.value.stage) == (WorkerLost, "policy", "reference")
    assert attempt.groups == ["found", "whole"]
    learning = streamed(lose)
    learning.columns, learning.arrivals = columns, arrivals
    arrivals.add(cast(Any, "lost"))
    with pytest.raises(WorkerLost):
        await attempt.stream(learning)
    assert arrivals.groups == ["found"]
    assert forgotten == [["lost", "whole"], ["lost"]]


async def test_all_ready_groups_are_taken_together_and_again_after_a_loss_but_the_last_are_left() -> None:
    arrivals: Any = Arrivals(4)
    for _ in range(2):  # one batch after the other
        waiting = asyncio.create_task(arrivals.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        arrivals.add("a")
        assert await waiting == ["a"]
        arrivals.add("b")
        arrivals.rewind()
        assert await arrivals.take() == ["a", "b"]
        arrivals.add("c")
        assert await arrivals.take() == ["c"]
        arrivals.add("d")
        assert [await arrivals.take(), await arrivals.take()] == [[], []]
        arrivals.begin()


EVERYONE = ("policy", "critic", "reference", "teacher")


@pytest.mark.parametrize("sharing", [EVERYONE, ("policy",), ()], ids=lambda names: " ".join(names) or "nobody")
async def test_engines_and_the_roles_on_their_gpus_take_turns(sharing: tuple[str, ...]) -> None:
    calls: list[str] = []
    critic = FakeTrained(calls)
    critic.name = "critic"
    members = (FakePolicy(calls), critic, FakeReference(calls), FakeTeacher(calls))
    roles: Any = {member.name: member for member in members}
    controller: Any = OnlineController.__new__(OnlineController)
    controller.roles = OnlineRoles(**roles, rollout=FakeEngines(calls), reward=roles["policy"])
    controller.sharing = frozenset(sharing)
    await controller.to_trainers(*EVERYONE, keep_weights=False)
    await controller._to_engines()
    back = [f"{name} comes back" for name in sharing]
    assert calls == (["sleep", *back, "policy leaves", "cache wakes"] if sharing else [])
    calls.clear()
    async with controller._trainers_turn("teacher"):
        calls.append("work")
    turn = ["sleep with weights", "teacher comes back", "work", "teacher leaves", "weights wakes", "cache wakes"]
    assert calls == (turn if "teacher" in sharing else ["work"])
