"""A failed start has a reason, such as the user's arguments, and each output of a step reaches the right request."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from actors.rollout.engine_thread import Aborted, EngineLoop, Submission
from rlhf.errors import ChildLost, RunError, UserError


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


class StreamingEngine:
    """An engine with a single request of three outputs, one in each step."""

    def __init__(self) -> None:
        self.left: list[Any] = []
        self.steps = 0
        core = SimpleNamespace(batch_queue=None, model_executor=None)
        self.engine_core = SimpleNamespace(engine_core=core, shutdown=lambda: None)

    def get_weight_version(self) -> str:
        return "1"

    def add_request(self, request_id: str, *_: Any, **__: Any) -> None:
        self.left = [SimpleNamespace(request_id=request_id, finished=number == 2) for number in range(3)]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def abort_request(self, request_ids: list[str]) -> None:
        self.left = []

    def step(self) -> list[Any]:
        self.steps += 1
        return [self.left.pop(0)]


def test_the_outputs_of_every_step_are_passed_on_and_a_future_gets_the_last() -> None:
    completed: list[Any] = []
    loop = EngineLoop(StreamingEngine, name="rollout engine 0", complete=lambda _, output: completed.append(output))
    passed_on: list[Any] = []
    loop.on_step = passed_on.extend
    loop.start().result(timeout=10.0)
    (future,) = loop.submit([Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)])
    last = future.result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)
    assert [output.finished for output in passed_on] == [False, False, True]
    assert completed == passed_on[2:] == [last]


def test_no_step_begins_while_the_loop_is_paused() -> None:
    loop = EngineLoop(StreamingEngine, name="rollout engine 0")
    loop.start().result(timeout=10.0)

    def pause(engine: Any, is_paused: bool) -> int:
        loop.is_paused = is_paused
        return int(engine.steps)

    loop.call(lambda engine: pause(engine, True))
    (future,) = loop.submit([Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)])
    for _ in range(3):
        assert loop.call(lambda engine: engine.steps).result(timeout=10.0) == 0
    loop.call(lambda engine: pause(engine, False))
    assert future.result(timeout=10.0).finished
    assert loop.stop(timeout_s=10.0)


class DyingEngine(StreamingEngine):
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
    loop = EngineLoop(lambda: DyingEngine(error, make_executor()), name="rollout engine 0")
    loop.start().result(timeout=10.0)
    if begins_with == "call":
        failed: Future[Any] = loop.call(lambda engine: engine.collective_rpc("update_weights"))
        with pytest.raises(ChildLost if is_lost else type(error)):
            failed.result(timeout=10.0)
        assert (loop.failure is None) != is_lost
    (request,) = loop.submit([Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)])
    with pytest.raises(RunError) as failure:
        request.result(timeout=10.0)
    assert isinstance(failure.value, ChildLost) == is_lost
    assert str(error) in str(failure.value)
    assert ("--resume auto" in str(failure.value)) != is_lost  # the driver says it if the run ends
    with pytest.raises(type(failure.value)):
        loop.call(lambda engine: engine).result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)


class GivenUp(Future[Any]):
    """A future whose waiter gives up right after a check of the unfinished future."""

    def done(self) -> bool:
        was_done = super().done()
        self.cancel()
        return was_done


def test_an_abort_goes_on_when_the_waiter_of_a_request_gives_up_meanwhile() -> None:
    loop = EngineLoop(StreamingEngine, name="rollout engine 0")
    loop.start().result(timeout=10.0)
    first, second = GivenUp(), Future[Any]()
    loop._waiting |= {"group0-1": first, "group0-2": second}
    assert loop.abort(["group0-"]).result(timeout=10.0) == 2
    assert first.cancelled()
    with pytest.raises(Aborted):
        second.result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)


class OverlappingEngine(StreamingEngine):
    """An engine that begins a step before returning the previous step's outputs, as vLLM's does on GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.is_held = False
        self.queue = self.engine_core.engine_core.batch_queue = []
        self.engine_core.engine_core.scheduler = SimpleNamespace(set_pause_state=self.hold, pause_state=0)
        self.fails = False

    def hold(self, state: int) -> None:
        self.is_held = bool(state)

    def step(self) -> list[Any]:
        if self.fails:
            raise ValueError("the device is lost")
        if self.left and not self.is_held:
            self.queue.append(self.left.pop(0))
            if len(self.queue) == 1:
                return []
        return [self.queue.pop(0)]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left or self.queue)


def test_a_call_comes_when_no_step_is_in_flight_and_a_new_request_waits_for_none() -> None:
    loop = EngineLoop(OverlappingEngine, name="rollout engine 0")
    passed_on: list[Any] = []
    seen: list[tuple[int, int]] = []
    asked = Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)

    def when_begun(outputs: Any) -> None:
        passed_on.extend(outputs)
        if len(passed_on) == 1:  # the second step is in flight
            loop._enqueue(lambda engine: seen.append((len(engine.queue), len(passed_on))))
            loop.call(lambda engine: seen.append((len(engine.queue), len(passed_on))))

    loop.on_step = when_begun
    loop.start().result(timeout=10.0)
    (future,) = loop.submit([asked])
    assert future.result(timeout=10.0).finished
    assert seen == [(1, 1), (0, 2)]
    assert not loop.call(lambda engine: engine.is_held).result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)


def test_an_engine_that_fails_in_the_step_in_flight_fails_the_call() -> None:
    loop = EngineLoop(OverlappingEngine, name="rollout engine 0")
    loop.start().result(timeout=10.0)
    calls: list[Any] = []

    def break_and_call(outputs: Any) -> None:
        loop._engine.fails = True
        calls.append(loop.call(lambda engine: None))

    loop.on_step = break_and_call
    (future,) = loop.submit([Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)])
    with pytest.raises(RunError, match="died with 1 requests in flight: ValueError: the device is lost"):
        future.result(timeout=10.0)
    with pytest.raises(RunError, match="the device is lost"):
        calls[0].result(timeout=10.0)
    assert loop.stop(timeout_s=10.0)


def test_an_engine_whose_outputs_nobody_can_take_has_failed_and_is_not_held() -> None:
    loop = EngineLoop(OverlappingEngine, name="rollout engine 0")
    loop.start().result(timeout=10.0)

    def lose(outputs: Any) -> None:
        raise RuntimeError("the event loop is closed")

    loop.on_step = lose
    (future,) = loop.submit([Submission(request_id="a", prompt_token_ids=(1,), params=None, lora=None)])
    with pytest.raises(RunError, match="died with 1 requests in flight: RuntimeError: the event loop is closed"):
        future.result(timeout=10.0)
    with pytest.raises(RunError, match="the event loop is closed"):
        loop.call(lambda engine: None).result(timeout=10.0)
    assert not loop._engine.is_held
    assert loop.stop(timeout_s=10.0)
