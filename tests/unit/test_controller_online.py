"""rlhf/controller/online.py trains, stores and publishes a step in the right order. Roles record calls."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.learning import Signals
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.controller.step_attempt import StepAttempt
from rlhf.controller.streamed_learning import Arrivals, StreamedAdvantageLearning
from rlhf.errors import ResultsLost, WorkerLost
from rlhf.rollouts.records.spool import group_path, write_group
from rlhf.tracking.metrics.reductions import Max
from tests.fakes.groups import INFO, REQUEST, ROLLOUTS, SAMPLING

LEARNING: dict[str, Any] = {
    "record": SimpleNamespace(apart=lambda *_, **__: nullcontext()),
    "config": SimpleNamespace(tracking=SimpleNamespace(samples_per_step=0)),
    "renews_reference": lambda step: False,
}


@pytest.mark.parametrize("is_due", [False, True])
async def test_a_reference_is_renewed_only_when_no_role_can_need_the_old_one_again(is_due: bool) -> None:
    calls: list[str] = []
    controller: Any = OnlineController.__new__(OnlineController)

    def noting(call: str, result: Any = None) -> Any:
        async def method(*_: Any) -> Any:
            calls.append(call)
            return result

        return method

    async def during(work: Any) -> None:
        await work

    controller.sharing = frozenset()
    controller.step = controller.trained_step = 1
    controller.survives = True
    controller.roles = SimpleNamespace(rollout=Published())
    controller.batches = SimpleNamespace(during=during, until_weights_may_change=noting("finish"))
    learning = {"learn": noting("learn", Signals()), "renew_reference": noting("renew")}
    controller.learning = SimpleNamespace(**{**LEARNING, **learning, "renews_reference": lambda step: is_due})
    controller.trained = {
        role: SimpleNamespace(take_snapshot=noting(f"{role} snapshot"), newest_snapshot=noting(f"{role} waits"))
        for role in ("actor", "critic")
    }
    controller._sync = noting("sync")
    await controller._learn_and_sync(attempt_at(2, controller))
    waits = ["actor waits", "critic waits"]
    renewal = [*waits, "renew"] if is_due else []
    assert calls == ["learn", "actor snapshot", "critic snapshot", "finish", *renewal, "sync", *waits]


async def test_weights_that_are_published_again_after_a_restart_leave_no_metrics_in_the_step() -> None:
    unused: Any = None
    record = RunRecord(folder=unused, tracker=unused, timeline=unused, progress=unused)
    controller: Any = OnlineController.__new__(OnlineController)
    published: list[int] = []

    async def sync(version: int) -> None:
        published.append(version)
        record.add({"weight_sync/probe_max_diff": Max(value=1.0)})

    controller.record, controller.step, controller.trained_step = record, 1, 1
    controller.is_published, controller._sync = False, sync
    await controller._publish_anew()
    assert published == [1]
    assert record.parts == []


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
    controller: Any = OnlineController.__new__(OnlineController)
    controller.config = SimpleNamespace(policy=SimpleNamespace(dtype="float32"))
    controller.roles, controller.probe_ids, controller.sharing = SimpleNamespace(policy=None, rollout=None), (), ()
    controller.scorer, controller.batches = SimpleNamespace(), SimpleNamespace(synced=synced)
    controller.in_flight = in_flight
    controller.record = SimpleNamespace(
        folder=SimpleNamespace(spool=tmp_path),
        progress=SimpleNamespace(stage=lambda _: None),
        timeline=SimpleNamespace(span=lambda *_: nullcontext()),
        add=lambda _: None,
    )
    await controller._sync(version)
    stored_before = [group_path(tmp_path, 0, 0), group_path(tmp_path, 1, 0), group_path(tmp_path, 2, 3)]
    assert at_sync == stored_before[:num_kept]


def attempt_at(step: int, controller: Any, *groups: str) -> StepAttempt:
    attempt = StepAttempt(step, controller.learning, getattr(controller, "scorer", None), cast(Any, None))
    attempt.groups = cast(Any, groups)
    controller.attempt = attempt
    return attempt


class Published:
    """The engines' and the policy's ends of a publication. Calls are recorded, and engines may miss the weights."""

    gives_published = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.missing = asyncio.Event()
        self.newest = 2  # step that the ranks have kept
        self.is_lost = False

    def lose_rank_0(self) -> None:
        """Lose the policy's first rank, noticed in the next call."""
        self.is_lost = True

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

    async def restore_snapshot(self, step: int) -> None:
        self._refuse_lost(f"restore {step}")
        self.calls.append(f"restore {step}")


def published(*, engines_have: int) -> tuple[Any, Published]:
    """Return a controller after step 2, with policy and engines in one object."""
    controller: Any = OnlineController.__new__(OnlineController)
    ends = Published()
    controller.roles = SimpleNamespace(rollout=ends, policy=ends)
    controller.trained = {"policy": ends}
    controller.step, controller.trained_step, controller.is_published = 2, 2, True
    controller.scorer = SimpleNamespace(weights=(engines_have, "sum"))
    controller.attempt = None
    controller.record = LEARNING["record"]
    controller.supervisor, controller.survives = SimpleNamespace(recover=rebuilt), True
    return controller, ends


async def rebuilt(lost: WorkerLost, rebuild: Any, *, work: Any) -> None:
    await rebuild()


async def test_a_restored_policy_publishes_what_the_engines_have_and_nothing_else() -> None:
    controller, ends = published(engines_have=2)
    await controller.restart_trained(2)
    assert ends.calls == ["restart", "restore 2", "withdraw", "publish 2", "offer manifest 2"]
    assert controller.is_published
    controller, ends = published(engines_have=1)  # lost during the sync of step 2, which is done again
    await controller.restart_trained(1)
    assert ends.calls == ["restart", "restore 2"]
    assert not controller.is_published


async def test_a_wait_for_engines_publishes_the_weights_that_a_successor_misses() -> None:
    controller, ends = published(engines_have=2)
    answered = asyncio.get_running_loop().create_future()

    async def despite_losses(work: Any) -> None:
        await work()

    controller.despite_losses = despite_losses
    wait = asyncio.create_task(controller._with_weights(answered, controller._publish_despite_losses))
    for _ in range(2):
        ends.missing.set()
        while ends.missing.is_set():
            await asyncio.sleep(0)
    answered.set_result("batch")
    assert await wait == "batch"
    assert ends.calls == ["withdraw", "publish 2", "offer manifest 2"] * 2


async def test_a_streamed_step_finds_the_loss_of_the_first_rank_that_a_successor_of_an_engine_waits_for() -> None:
    controller, ends = published(engines_have=2)
    groups = asyncio.get_running_loop().create_future()  # all of them are sampled by the lost engine

    async def take(step: int) -> str:
        while "offer manifest 2" not in ends.calls:
            await asyncio.sleep(0)
        groups.set_result("arrived")
        return "batch"

    async def stream(step: int) -> float:
        await asyncio.shield(groups)
        return 2.5

    ends.lose_rank_0()
    controller.batches = SimpleNamespace(take=take)
    controller.learning = SimpleNamespace(**LEARNING, stream=stream)
    attempt = attempt_at(3, controller)
    taken = asyncio.create_task(controller._take_and_stream(attempt, controller.learning))
    ends.missing.set()
    assert await asyncio.wait_for(taken, timeout=60) == "batch"
    assert attempt.busy_s == 2.5
    assert ends.calls == [
        *("withdraw", "lost: publish 2"),
        *("restart", "restore 2", "withdraw", "publish 2", "offer manifest 2"),
    ]


async def test_a_step_is_trained_again_if_a_batch_ahead_needs_the_weights_before_it() -> None:
    controller, ends = published(engines_have=2)
    sampled = asyncio.get_running_loop().create_future()  # the batch ahead

    async def learn(groups: Any, step: int) -> Signals:
        ends.calls.append(f"learn {step}")
        return Signals()

    async def take_snapshot(step: int) -> None:
        controller.trained_step = step
        ends.newest = step

    async def finish() -> None:
        if controller.trained_step == 3 and ends.calls.count("learn 3") == 1:
            ends.lose_rank_0()
            ends.missing.set()
        await asyncio.shield(sampled)

    async def sync(step: int) -> None:
        ends.calls.append(f"sync {step}")

    def offer(manifest: str) -> None:
        Published.offer_weights(ends, manifest)
        sampled.set_result("whole")

    async def during(work: Any) -> None:
        await work

    async def nothing(*_: Any) -> None: ...

    ends.offer_weights = offer  # type: ignore[method-assign]
    controller.sharing, controller._sync, controller.take_snapshot = frozenset(), sync, take_snapshot
    controller.wait_for_snapshots = nothing
    controller.learning = SimpleNamespace(**LEARNING, learn=learn)
    controller.batches = SimpleNamespace(during=during, until_weights_may_change=finish)
    attempt = attempt_at(3, controller, "group")
    attempt.begin_again = lambda: ends.calls.append("begin again")  # type: ignore[method-assign]
    learn_and_sync = controller.despite_losses(partial(controller._learn_and_sync, attempt), oldest=2)
    await asyncio.wait_for(learn_and_sync, timeout=60)
    assert ends.calls == [
        *("learn 3", "lost: restore 2", "restart", "restore 2", "begin again"),
        *("withdraw", "publish 2", "offer manifest 2", "learn 3", "sync 3"),
    ]


async def test_lost_tokens_of_a_training_batch_are_restored_and_the_policy_begins_again() -> None:
    controller, ends = published(engines_have=1)
    controller.step, controller.trained_step, controller.sharing = 1, 1, frozenset()
    given: list[Any] = []

    async def learn(groups: Any, step: int) -> Signals:
        given.append(groups)
        if groups == ("lost",):
            raise ResultsLost("the node is gone.", role="reference", rank=0, stage="reference", kind="died")
        return Signals()

    async def restored(groups: Any, sampling: Any) -> list[str]:
        return ["found"]

    async def recover(lost: WorkerLost, rebuild: Any, *, work: Any) -> None:
        assert not isinstance(lost, ResultsLost)
        assert (lost.role, lost.stage) == ("policy", "reference")
        ends.calls.append("recover")

    async def take_snapshot(step: int) -> None:
        controller.trained_step = step

    async def nothing(*_: Any) -> None: ...

    async def during(work: Any) -> None:
        await work

    controller.supervisor = SimpleNamespace(recover=recover)
    forgotten: list[Any] = []
    controller.learning = SimpleNamespace(**LEARNING, learn=learn, columns=SimpleNamespace(forget=forgotten.append))
    controller.scorer.restored = restored
    controller.batches = SimpleNamespace(during=during, until_weights_may_change=nothing)
    controller._sync, controller.take_snapshot = nothing, take_snapshot
    attempt = attempt_at(2, controller, "lost")
    await controller.despite_losses(partial(controller._learn_and_sync, attempt), oldest=1)
    assert attempt.groups == ["found"]
    assert given == [("lost",), ["found"]]
    assert ends.calls == ["recover"]
    assert forgotten == [("lost",)], "columns of the reference that were computed from them may be lost too"


async def test_lost_tokens_of_a_streamed_batch_are_restored_and_the_stream_begins_again() -> None:
    controller, ends = published(engines_have=2)
    arrivals, streamed = Arrivals(2), list[Any]()
    for group in ("lost", "whole"):
        arrivals.add(cast(Any, group))

    async def take(step: int) -> str:
        return "batch"

    async def stream(step: int) -> float:
        streamed.append(list(arrivals.groups))
        if streamed[-1][0] == "lost":
            raise ResultsLost("the node is gone.", role="policy", rank=0, stage="experience", kind="died")
        return 2.5

    async def restored(groups: Any, sampling: Any) -> list[str]:
        return ["found", *groups[1:]]

    learning: Any = StreamedAdvantageLearning.__new__(StreamedAdvantageLearning)
    learning.arrivals, learning.stream, learning.record = arrivals, stream, LEARNING["record"]
    learning.columns = SimpleNamespace(forget=lambda groups: None)
    controller.learning, controller.scorer.restored = learning, restored
    controller.batches = SimpleNamespace(take=take)
    attempt = attempt_at(3, controller)
    assert await asyncio.wait_for(controller._take_and_stream(attempt, learning), timeout=60) == "batch"
    assert attempt.busy_s == 2.5
    assert streamed == [["lost", "whole"], ["found", "whole"]]
    assert "restart" in ends.calls
