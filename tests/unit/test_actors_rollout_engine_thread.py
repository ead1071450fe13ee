"""Why an engine did not start: the user's arguments, or something else. Which outputs of a step go where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.engine_thread import EngineLoop, Submission
from rlhf.errors import RunError, UserError


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
    """An engine whose only request has three outputs, one in each step."""

    def __init__(self) -> None:
        self.left: list[Any] = []
        self.steps = 0
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def get_weight_version(self) -> str:
        return "1"

    def add_request(self, request_id: str, *_: Any, **__: Any) -> None:
        self.left = [SimpleNamespace(request_id=request_id, finished=number == 2) for number in range(3)]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

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
