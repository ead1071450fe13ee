"""A failed start has a reason, such as the user's arguments, and each output of a step reaches the right request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from actors.rollout.engine_thread import Aborted, EngineLoop, Submission
from rlhf.errors import ChildLost, RunError, UserError
from tests.fakes.vllm_engine import FakeEngine

ASKED = Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)


@contextmanager
def started(build: Callable[[], Any], **options: Any) -> Iterator[EngineLoop]:
    loop = EngineLoop(build, name="rollout engine 0", **options)
    loop.start().result(timeout=10.0)
    yield loop
    assert loop.stop(timeout_s=10.0)


@pytest.mark.parametrize(("error", "expected"), [(UserError("wrong"), UserError), (ValueError("no"), RunError)])
def test_only_arguments_that_vllm_refuses_are_the_users_mistake(error: Exception, expected: type[Exception]) -> None:
    def build() -> Any:
        raise error

    loop = EngineLoop(build, name="rollout engine 0")
    with pytest.raises(expected):
        loop.start().result(timeout=10.0)
    with pytest.raises(RunError, match="rollout engine 0 did not start"):
        loop.call(lambda engine: engine).result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)


def test_the_outputs_of_every_step_are_passed_on_and_a_future_gets_the_last() -> None:
    completed: list[Any] = []
    passed_on: list[Any] = []
    with started(FakeEngine, complete=lambda _, output: completed.append(output)) as loop:
        loop.on_step = passed_on.extend
        (future,) = loop.submit([ASKED])
        last = future.result(timeout=10.0)
    assert [output.finished for output in passed_on] == [False, False, True]
    assert completed == passed_on[2:] == [last]


def test_no_step_begins_while_the_loop_is_paused() -> None:
    with started(FakeEngine) as loop:
        loop.call(lambda engine: setattr(loop, "is_paused", True))
        (future,) = loop.submit([ASKED])
        for _ in range(3):
            assert loop.call(lambda engine: engine.steps).result(timeout=10.0) == 0
        loop.call(lambda engine: setattr(loop, "is_paused", False))
        assert future.result(timeout=10.0).finished


class DyingEngine(FakeEngine):
    """An engine with errors in steps and calls. `executor`: runs the engine's model."""

    def __init__(self, error: Exception, executor: Any = None) -> None:
        super().__init__()
        self.error = error
        self.engine_core.engine_core.model_executor = executor

    def step(self) -> list[Any]:
        raise self.error

    def collective_rpc(self, method: str) -> None:
        raise self.error


def with_dead_worker() -> Any:
    """vLLM's executor of several worker processes, including a dead process."""
    executor = MultiprocExecutor.__new__(MultiprocExecutor)
    executor.is_failed = True
    return executor


@pytest.mark.parametrize("begins_with", ["step", "call"])
@pytest.mark.parametrize(
    ("error", "make_executor", "is_lost"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), object, True),
        (RuntimeError("Worker failed with error 'CUDA error: misaligned address', please check"), object, True),
        (RuntimeError("cancelled"), with_dead_worker, True),
        (torch.OutOfMemoryError("CUDA out of memory."), object, False),
        (RuntimeError("a bug"), object, False),
    ],
)
def test_an_engine_without_its_gpu_or_a_worker_is_given_to_the_driver_as_lost(
    error: Exception, make_executor: Any, is_lost: bool, begins_with: str
) -> None:
    with started(lambda: DyingEngine(error, make_executor())) as loop:
        if begins_with == "call":
            failed: Future[Any] = loop.call(lambda engine: engine.collective_rpc("update_weights"))
            with pytest.raises(ChildLost if is_lost else type(error)):
                failed.result(timeout=10.0)
            assert (loop.failure is None) != is_lost
        (request,) = loop.submit([ASKED])
        with pytest.raises(RunError, match=re.escape(str(error))) as failure:
            request.result(timeout=10.0)
        assert isinstance(failure.value, ChildLost) == is_lost
        assert ("--resume auto" in str(failure.value)) != is_lost  # the driver adds this hint if the run ends
        with pytest.raises(type(failure.value)):
            loop.call(lambda engine: engine).result(timeout=10.0)


class GivenUp(Future[Any]):
    """A future whose waiter gives up right after a check of the unfinished future."""

    def done(self) -> bool:
        was_done = super().done()
        self.cancel()
        return was_done


def test_an_abort_goes_on_when_the_waiter_of_a_request_gives_up_meanwhile() -> None:
    with started(FakeEngine) as loop:
        first, second = GivenUp(), Future[Any]()
        loop._waiting |= {"group0-1": first, "group0-2": second}
        assert loop.abort(["group0-"]).result(timeout=10.0) == 2
        assert first.cancelled()
        with pytest.raises(Aborted):
            second.result(timeout=10.0)


class OverlappingEngine(FakeEngine):
    """An engine that begins a step before returning the previous step's outputs, as vLLM's does on GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.is_held = self.fails = False
        self.queue = self.engine_core.engine_core.batch_queue = []
        self.engine_core.engine_core.scheduler = SimpleNamespace(set_pause_state=self.hold, pause_state=0)

    def hold(self, state: int) -> None:
        self.is_held = bool(state)

    def step(self) -> list[Any]:
        if self.fails:
            raise ValueError("the device is lost")
        if self.left and not self.is_held:
            self.queue.append(super().step())
            if len(self.queue) == 1:
                return []
        outputs: list[Any] = self.queue.pop(0)
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self.left or self.queue)


def test_a_call_comes_when_no_step_is_in_flight_and_a_new_request_waits_for_none() -> None:
    passed_on: list[Any] = []
    seen: list[tuple[int, int]] = []
    with started(OverlappingEngine) as loop:

        def when_begun(outputs: Any) -> None:
            passed_on.extend(outputs)
            if len(passed_on) == 1:  # the second step is in flight
                loop._enqueue(lambda engine: seen.append((len(engine.queue), len(passed_on))))
                loop.call(lambda engine: seen.append((len(engine.queue), len(passed_on))))

        loop.on_step = when_begun
        (future,) = loop.submit([ASKED])
        assert future.result(timeout=10.0).finished
        assert seen == [(1, 1), (0, 2)]
        assert not loop.call(lambda engine: engine.is_held).result(timeout=10.0)


@pytest.mark.parametrize("error", ["ValueError: the device is lost", "RuntimeError: the event loop is closed"])
def test_an_engine_that_fails_in_the_step_in_flight_or_with_its_outputs_fails_the_call(error: str) -> None:
    calls: list[Any] = []
    with started(OverlappingEngine) as loop:

        def break_and_call(outputs: Any) -> None:
            calls.append(loop.call(lambda engine: None))
            loop._engine.fails = "device" in error
            if not loop._engine.fails:
                raise RuntimeError("the event loop is closed")

        loop.on_step = break_and_call
        (future,) = loop.submit([ASKED])
        with pytest.raises(RunError, match=f"died with 1 requests in flight: {error}"):
            future.result(timeout=10.0)
        for call in (*calls, loop.call(lambda engine: None)):
            with pytest.raises(RunError, match=error):
                call.result(timeout=10.0)
        assert not loop._engine.is_held
