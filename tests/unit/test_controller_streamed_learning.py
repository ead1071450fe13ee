"""Groups of a batch arrive in turn. A streamed step survives failures of rollouts or training meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf.controller.online import OnlineController
from rlhf.controller.step_attempt import StepAttempt
from rlhf.controller.streamed_learning import Arrivals, StreamedAdvantageLearning
from rlhf.errors import RunError, WorkerLost


def test_all_ready_groups_are_taken_together_and_the_last_are_left() -> None:
    async def take() -> list[Any]:
        arrivals: Any = Arrivals(4)
        taken = []
        for _ in range(2):  # one batch after the other
            waiting = asyncio.create_task(arrivals.take())
            await asyncio.sleep(0)
            assert not waiting.done()
            arrivals.add("a")
            taken.append(await waiting)
            for group in "bc":
                arrivals.add(group)
            taken.append(await arrivals.take())
            arrivals.add("d")
            taken += [await arrivals.take(), await arrivals.take()]
            arrivals.begin()
        return taken

    assert asyncio.run(take()) == [["a"], ["b", "c"], [], []] * 2


def test_taken_groups_are_handed_over_again_after_a_loss() -> None:
    async def take() -> list[Any]:
        arrivals: Any = Arrivals(3)
        arrivals.add("a")
        taken = [await arrivals.take()]
        arrivals.add("b")
        arrivals.rewind()
        taken.append(await arrivals.take())
        arrivals.add("c")
        return [*taken, await arrivals.take()]

    assert asyncio.run(take()) == [["a"], ["a", "b"], []]


def streamed(stream: Any, calls: list[str]) -> Any:
    """Return a learning with the given stream. New beginnings are recorded in `calls`."""
    learning: Any = StreamedAdvantageLearning.__new__(StreamedAdvantageLearning)
    learning.record = SimpleNamespace(apart=lambda *_, **__: nullcontext())
    learning.stream, learning.begin_again = stream, lambda: calls.append("begin again")
    return learning


def step_of(take: Any, learning: Any) -> tuple[Any, float]:
    """Return the batch that a controller takes from such a queue, and the seconds of learning meanwhile."""
    controller: Any = OnlineController.__new__(OnlineController)
    controller.record, controller.trained_step, controller.roles = SimpleNamespace(apart=None, add=None), 0, ROLES
    controller.record.apart = lambda *_, **__: nullcontext()
    controller.batches, controller.learning = SimpleNamespace(take=take), learning
    controller.sharing, controller.notice = frozenset(), SimpleNamespace(unless_given=lambda work: work)
    attempt = StepAttempt(1, learning, *[cast(Any, None)] * 2)
    return asyncio.run(asyncio.wait_for(controller._take(attempt), timeout=60)), attempt.busy_s


async def never(step: int) -> Any:
    await asyncio.Event().wait()


ROLES = SimpleNamespace(rollout=SimpleNamespace(weights_are_missing=lambda: never(1)))


async def fail(step: int) -> Any:
    raise RunError(f"step {step} failed")


async def batch(step: int) -> str:
    return f"batch {step}"


async def work(step: int) -> float:
    return 2.5


def test_a_batch_is_returned_with_the_seconds_of_the_work_on_it() -> None:
    assert step_of(batch, streamed(work, [])) == ("batch 1", 2.5)
    assert step_of(batch, None) == ("batch 1", 0.0)


@pytest.mark.parametrize(("take", "stream"), [(fail, never), (never, fail)], ids=["rollouts", "training"])
def test_a_failure_ends_a_streamed_step_while_the_other_side_waits(take: Any, stream: Any) -> None:
    with pytest.raises(RunError, match="step 1 failed"):
        step_of(take, streamed(stream, []))


async def test_the_groups_of_a_batch_are_streamed_again_after_a_loss_while_others_arrive() -> None:
    calls: list[str] = []

    class Ranks:
        async def restart(self) -> None:
            calls.append("restart")

        async def newest_snapshot(self) -> int:
            return 0

        async def restore_snapshot(self, step: int) -> None:
            calls.append(f"restore {step}")

    async def stream(step: int) -> float:
        calls.append("stream")
        if calls.count("stream") == 1:
            raise WorkerLost("lost", role="policy", rank=0, stage="update", kind="died")
        return 2.5

    async def take(step: int) -> str:
        calls.append("take")
        while calls.count("stream") < 2:
            await asyncio.sleep(0)
        return "batch"

    async def recover(lost: WorkerLost, rebuild: Any, *, work: Any) -> None:
        await rebuild()

    controller: Any = OnlineController.__new__(OnlineController)
    controller.record = SimpleNamespace(apart=lambda *_, **__: nullcontext())
    controller.trained, controller.survives = {"policy": Ranks()}, True
    controller.step = controller.checkpoint_step = controller.trained_step = 0
    controller.supervisor = SimpleNamespace(recover=recover)
    controller.batches, controller.roles, controller.is_published = SimpleNamespace(take=take), ROLES, False
    learning = streamed(stream, calls)
    attempt = controller.attempt = StepAttempt(1, learning, *[cast(Any, None)] * 2)
    attempt.metrics.append(cast(Any, "of the broken attempt"))
    assert await controller._take_and_stream(attempt, learning) == "batch"
    calls.remove("take")  # which begins at the same time
    assert calls == ["stream", "restart", "restore 0", "begin again", "stream"]
    assert (attempt.busy_s, attempt.metrics) == (2.5, [])
