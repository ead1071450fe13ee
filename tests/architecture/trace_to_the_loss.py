"""Print the files on the stack between `rlhf.train` and the equation of the loss, in a run of GRPO without Ray.

`python -m tests.architecture.trace_to_the_loss` makes a tiny run until its first loss. A rank is called in this process
where Ray would call an actor, and tests/curves has the engine and the rewards. All else is a run's own code. The stack
of a task or thread follows the stack of the code that started the task or thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import json
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import rlhf
from actors.roles.gang import PolicyGang
from actors.roles.ranks import PolicyRank
from actors.run import train
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.inputs import OnlineInputs, StageInputs
from tests.curves import in_process
from tests.fakes.calls import ref
from tests.fakes.roles import FakeManifest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = (f"{ROOT}/rlhf/", f"{ROOT}/actors/")
Stack = tuple[str, ...]
STARTED_BY: contextvars.ContextVar[Stack] = contextvars.ContextVar("started_by", default=())


class LossReached(Exception):
    """Ends the run at its first loss."""


def stack() -> Stack:
    """Return the files of the product on the stack, the outermost first."""
    files: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith("asyncio/events.py"):
        files.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return STARTED_BY.get() + tuple(name for name in reversed(files) if name.startswith(PRODUCT))


def follow_tasks_and_threads() -> None:
    """Let each task and thread know the stack of the code that starts the task or thread."""
    create, start = asyncio.BaseEventLoop.create_task, threading.Thread.start

    def create_task(loop: Any, work: Any, *, context: contextvars.Context | None = None, **options: Any) -> Any:
        context = contextvars.copy_context() if context is None else context.copy()
        context.run(STARTED_BY.set, stack())
        return create(loop, work, context=context, **options)

    def start_thread(thread: threading.Thread) -> None:
        context, run = contextvars.copy_context(), thread.run
        context.run(STARTED_BY.set, stack())
        thread.run = lambda: context.run(run)  # type: ignore[method-assign]
        start(thread)

    asyncio.BaseEventLoop.create_task = create_task  # type: ignore[assignment,method-assign]
    threading.Thread.start = start_thread  # type: ignore[method-assign]


class Handle:
    """A rank in this process, called as Ray's handle of an actor."""

    def __init__(self, rank: PolicyRank) -> None:
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._rank, name)

        def options(*, num_returns: int) -> Any:
            def remote(*args: Any) -> Any:
                column, small = method(*args)
                return column, ref(small)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(remote=lambda *args: ref(method(*args)), options=options)


@asynccontextmanager
async def online(stage: StageInputs, inputs: OnlineInputs, record: RunRecord) -> AsyncIterator[Any]:
    """Yield the controller of a run whose roles are in this process."""
    with mock.patch.dict(in_process.WORKERS, {"advantages": PolicyRank}):
        roles, _ = in_process._roles(stage.config, inputs, None)
    rank: PolicyRank = roles.policy.worker  # type: ignore[attr-defined]
    manifest = FakeManifest(0)
    rank.sender = SimpleNamespace(publish=lambda *_: manifest, send=lambda *_: None, settle=lambda: None)  # type: ignore[assignment]
    gang: Any = PolicyGang([Handle(rank)], deadline_s=60.0, one_host=True)  # type: ignore[list-item]
    controller = OnlineController(
        stage.config,
        replace(roles, policy=gang),
        record,
        prompts=train.stream_of(stage),
        eval_sets=inputs.eval_sets,
        marking=inputs.marking,
        probe_ids=inputs.probe_ids,
        policy_fingerprint="",
        rewards_fingerprint="",
        supervisor=train.Supervisor(stage.config.cluster.restarts, record, ("policy",)),
    )
    yield controller, SimpleNamespace(nodes=frozenset)


def way() -> list[str]:
    """Return the files in the order of appearance on the stack."""
    reached: list[Stack] = []
    equations = importlib.import_module("rlhf.objectives.policy_loss")  # a name from rlhf.objectives is a stand-in
    loss: Callable[..., Any] = equations.clipped_loss

    def note(*_: Any, **__: Any) -> None:
        reached.append((*stack(), loss.__code__.co_filename))
        raise LossReached

    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run": {"name": "trace", "dir": folder},
            "policy": {"model": str(build_tiny_llama(Path(folder) / "model", seed=0)), "dtype": "float32"},
            "algorithm": {"name": "grpo"},
            "data": {"train": {"task": "running_totals", "split": "train", "size": 8}, "apply_chat_template": False},
            "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
            "rewards": {"correct": {"function": "last_number"}},
            "train": {"steps": 1, "lr": 1e-3, "warmup_steps": 0, "sequences_per_update": 4},
            "cluster": {"device": "cpu"},
        }
        in_process.join_alone()
        follow_tasks_and_threads()
        node = SimpleNamespace(get_node_id=lambda: "here")
        with (
            mock.patch.object(train, "connected", return_value=nullcontext()),
            mock.patch.object(train, "online_roles", online),
            mock.patch.object(train.ray, "get_runtime_context", return_value=node),
            mock.patch.object(equations, "clipped_loss", note),
            suppress(LossReached),
        ):
            rlhf.train(config, quiet=True)
    return list(dict.fromkeys(str(Path(name).relative_to(ROOT)) for name in reached[0]))


if __name__ == "__main__":
    print(json.dumps(way()))  # noqa: T201
