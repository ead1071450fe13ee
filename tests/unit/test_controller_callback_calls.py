"""Callbacks follow the loop and may stop the loop. The error of a failed callback names the line."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlhf
from rlhf.controller.callback_calls import CallbackCalls, CallbackFailed
from rlhf.controller.loop import TrainingLoop
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.errors import Preempted, UserError
from rlhf.tracking.callbacks import check_callbacks
from rlhf.tracking.metrics.reductions import Last, Sum
from rlhf.tracking.run_folder.folder import RunFolder
from rlhf.tracking.sinks.backends import TrackerBackend
from rlhf.tracking.sinks.installed import TrackedRun
from rlhf.tracking.sinks.tracker import Tracker
from tests.fakes.configs import offline_config
from tests.fakes.records import quiet_record

RUN = TrackedRun(name="demo", folder=Path("demo"), config={}, done_steps=None)


class Recorder(rlhf.Callback):
    """Notes all calls, and raises the given error in one of them."""

    def __init__(self, at: tuple[str, int] | None = None, error: BaseException | None = None) -> None:
        self.calls: list[Any] = []
        self.at, self.error = at, error

    def note(self, event: str, step: int, *more: Any) -> None:
        self.calls.append((event, step, *more))
        if (event, step) == self.at and self.error is not None:
            raise self.error  # here

    def on_start(self, run: TrackedRun) -> None:
        self.note("start", -1, run.name)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.note("evaluation", step, dict(metrics))

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.note("step", step, metrics["update/lr"])

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.note("checkpoint", step, (folder / "policy/weights").exists())

    def on_end(self, error: Exception | None) -> None:
        self.note("end", -1, error and type(error).__name__)


LINE = 1 + Path(__file__).read_text(encoding="utf-8").splitlines().index("            raise self.error  # here")
PLACE = f"at {__file__}:{LINE} in note"


class Policy:
    async def arithmetic(self) -> Any:
        return SimpleNamespace(utilisation=lambda **_: 0.0)

    async def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").touch()


class Loop(TrainingLoop):
    async def train_step(self, step: int) -> None:
        parts: dict[str, Any] = {"update/lr": Last(value=1.0 / step), "update/tokens/total": Sum(total=4)}
        self.record.add(parts | {"time/update_s": Sum(total=1.0)})

    async def evaluate(self, step: int) -> None:
        self.record.add({"eval/heldout/loss": Last(value=float(step))})

    def trained_tokens(self, row: Mapping[str, float]) -> tuple[float, float]:
        return 4.0, 2.0

    def position(self) -> Mapping[str, Any]:
        return {}

    async def restore_position(self, state: Mapping[str, Any]) -> None: ...


@pytest.fixture
def record(tmp_path: Path) -> Iterator[RunRecord]:
    with RunFolder.open(tmp_path, "demo", resume=False) as folder:
        yield quiet_record(folder, Tracker(folder.path))


def train(record: RunRecord, *callbacks: rlhf.Callback) -> bool:
    """Train four steps with an evaluation and a checkpoint every second step. Return whether the run is over."""
    every = {"train": {"steps": 4, "checkpoint_every": 2}, "eval": {"every": 2}, "data": {"eval": "b.jsonl"}}
    config = offline_config(**every, cluster={"restarts": {"gang": 0}})
    record.callbacks = CallbackCalls(callbacks)
    sets: dict[str, Any] = {"eval_sets": ["heldout"], "eval_metric": "loss", "lower_is_better": True}
    loop = Loop(
        config,
        record,
        {},
        {"policy": Policy()},  # type: ignore[dict-item]
        **sets,
        policy_fingerprint="",
        supervisor=Supervisor(config.cluster.restarts, record, ("policy",)),
    )

    async def follow() -> bool:
        async with record.callbacks.following(RUN):
            return await loop.run()

    return asyncio.run(follow())


def checkpoints(record: RunRecord) -> list[int]:
    return sorted(record.folder.checkpoint_steps())


def test_a_callback_is_told_of_start_steps_evaluations_checkpoints_and_end(record: RunRecord) -> None:
    recorder = Recorder()
    assert train(record, recorder)
    assert recorder.calls == [
        ("start", -1, "demo"),
        ("evaluation", 0, {"eval/heldout/loss": 0.0}),
        ("step", 1, 1.0),
        ("evaluation", 2, {"eval/heldout/loss": 2.0}),
        ("step", 2, 0.5),
        ("checkpoint", 2, True),
        ("step", 3, 1.0 / 3.0),
        ("evaluation", 4, {"eval/heldout/loss": 4.0}),
        ("step", 4, 0.25),
        ("checkpoint", 4, True),
        ("end", -1, None),
    ]


@pytest.mark.parametrize(("at", "steps"), [("evaluation", 0), ("step", 1), ("evaluation", 2), ("checkpoint", 2)])
def test_a_callback_stops_the_run_with_a_checkpoint(
    record: RunRecord, caplog: pytest.LogCaptureFixture, at: str, steps: int
) -> None:
    """The other callbacks get the calls of the step too. The run is over, and the final model is written."""
    stopper, other = Recorder((at, steps), rlhf.StopRun("good\nenough")), Recorder()
    with caplog.at_level(logging.INFO):
        assert train(record, stopper, other)
    assert stopper.calls == other.calls
    assert other.calls[-1] == ("end", -1, None)
    assert max(step for _, step, *_ in other.calls) == steps
    assert checkpoints(record) == [steps] * (steps > 0)
    if steps:
        assert ("checkpoint", steps, True) in other.calls
        message = f"step {steps}: the callback `Recorder.on_{at}` stops the run: good enough"
        assert message in [entry.getMessage() for entry in caplog.records]


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), StopIteration(), KeyboardInterrupt()])
def test_an_error_in_a_callback_is_named_with_its_line_after_a_checkpoint(
    record: RunRecord, error: BaseException
) -> None:
    failing, other = Recorder(("step", 1), error), Recorder()
    with pytest.raises(CallbackFailed) as caught:
        train(record, failing, other)
    shown = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    kept = "A checkpoint of step 1 is written. The run can be resumed with --resume auto."
    assert str(caught.value) == f"the callback `Recorder.on_step` raised {shown}, {PLACE}. {kept}"
    assert caught.value.__cause__ is error
    assert checkpoints(record) == [1]
    assert failing.calls[-1] == ("step", 1, 1.0)
    assert other.calls[-1] == ("end", -1, "CallbackFailed")


def test_an_error_at_the_end_is_an_error_of_the_run_but_hides_no_other_error(
    record: RunRecord, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CallbackFailed, match=r"^the callback `Recorder\.on_end` raised ValueError: last, at "):
        train(record, Recorder(("end", -1), ValueError("last")))

    async def preempted() -> None:
        async with CallbackCalls([Recorder(("end", -1), ValueError("last"))]).following(RUN):
            raise Preempted("a signal")

    with pytest.raises(Preempted, match="a signal"):
        asyncio.run(preempted())
    assert "the callback `Recorder.on_end` raised ValueError: last" in caplog.text


class Reading(rlhf.Callback):
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        json.loads("{")  # fails


def test_an_error_in_a_library_is_named_with_the_line_of_the_callback(record: RunRecord) -> None:
    line = 1 + Path(__file__).read_text(encoding="utf-8").splitlines().index('        json.loads("{")  # fails')
    with pytest.raises(CallbackFailed, match=rf"decoder\.py:\d+ in .*, called from {__file__}:{line} in on_step\."):
        train(record, Reading())


class Slow(rlhf.Callback):
    timeout_s = 0.6

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        time.sleep(5.0)  # hangs


def test_a_callback_that_hangs_is_named_and_ends_the_run(
    record: RunRecord, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.controller.callback_calls.SLOW_AFTER_S", 0.2)
    line = 1 + Path(__file__).read_text(encoding="utf-8").splitlines().index("        time.sleep(5.0)  # hangs")
    place = f"at {__file__}:{line} in on_step"
    began = time.monotonic()
    expected = f"^the callback `Slow.on_step` did not return within 0.6 s, {place}. The limit is its attribute"
    with pytest.raises(CallbackFailed, match=expected):
        train(record, Slow())
    assert time.monotonic() - began < 4.0
    assert checkpoints(record) == [1]
    assert f"the callback `Slow.on_step` has run for 0 s, {place}, and the run waits for it" in caplog.text


async def test_a_run_that_ends_while_a_callback_hangs_does_not_wait_for_the_callback() -> None:
    """As for a run that is preempted: the loop is cancelled, and then the stage ends with Preempted."""
    calls, begun, release = list[str](), threading.Event(), threading.Event()

    class Hanging(rlhf.Callback):
        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            begun.set()
            release.wait(20.0)

        def on_end(self, error: Exception | None) -> None:
            calls.append("end")

    async def follow() -> None:
        callbacks = CallbackCalls([Hanging()])
        async with callbacks.following(RUN):
            step = asyncio.ensure_future(callbacks.call("on_step", 1, {}))
            assert await asyncio.to_thread(begun.wait, 10.0)
            step.cancel()
            await asyncio.wait({step})
            raise Preempted("a signal")

    try:
        with pytest.raises(Preempted):
            await asyncio.wait_for(follow(), 10.0)
    finally:
        release.set()
    assert not calls


def test_all_calls_come_from_one_thread_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []

    class Naming(rlhf.Callback):
        def on_start(self, run: TrackedRun) -> None:
            threads.append(threading.current_thread())

        def on_end(self, error: Exception | None) -> None:
            threads.append(threading.current_thread())

    async def follow() -> None:
        async with CallbackCalls([Naming(), Naming()]).following(RUN):
            pass

    asyncio.run(follow())
    assert len(threads) == 4
    (thread,) = set(threads)
    assert thread is not threading.main_thread()
    thread.join(5.0)
    assert not thread.is_alive()


def _with(method: str, function: Any) -> rlhf.Callback:
    return type("Mine", (rlhf.Callback,), {method: function})()  # type: ignore[no-any-return]


async def _asynchronous(self: Any, step: int, metrics: Mapping[str, float]) -> None: ...


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (print, "is of type builtin_function_or_method, expected an instance of a subclass of rlhf.Callback"),
        (_with("timeout_s", None), "`Mine.timeout_s` is None, expected a number of seconds above 0"),
        (Recorder, "is the class Recorder, expected an instance of a subclass of rlhf.Callback"),
        (_with("on_steps", lambda self: None), "`Mine.on_steps` is never called; did you mean `on_step`?"),
        (_with("on_step", lambda self: None), "`Mine.on_step` cannot be called as `on_step(step, metrics)`: too many"),
        (_with("on_step", _asynchronous), "`Mine.on_step` is async; a callback is called without an event loop"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_starts(callback: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        check_callbacks([Recorder(), callback])
    assert str(error.value).startswith(f"callbacks[1]: {expected}")


def test_callbacks_and_trackers_stand_in_a_list() -> None:
    with pytest.raises(UserError, match=r"^callbacks: is of type Recorder, expected a list"):
        rlhf.train("run.yaml", callbacks=Recorder())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^trackers: is of type type, expected a list"):
        rlhf.train("run.yaml", trackers=TrackerBackend)  # type: ignore[arg-type]
