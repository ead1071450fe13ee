"""Why an engine did not start: the user's arguments, or something else."""

from __future__ import annotations

from typing import Any

import pytest

from actors.rollout.engine_thread import EngineLoop
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
