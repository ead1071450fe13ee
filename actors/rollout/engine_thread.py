"""The thread of the vLLM engine, for the engine's steps and everything else between two steps.

vLLM's core runs in this process, not in a separate one. A request with a matching stop string therefore leaves the
batch after the same number of steps each time, so a batch depends only on the requests. Without a separate process an
engine also starts in a third of the time. No other thread may touch the engine.

With asynchronous scheduling, vLLM's default on GPUs, a step still runs when `step` returns. Every call first waits for
this step to finish. So calls change how later steps group the requests.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from actors.rollout.continuation import output_so_far, restore_output
from actors.rollout.image_inputs import ImageInputs
from actors.rollout.vllm_engine import has_lost_workers, has_step_in_flight, lacks_cache, no_new_steps, put_first
from rlhf.engine.device_errors import has_lost_device
from rlhf.engine.memory import advice_on_memory, is_out_of_memory
from rlhf.errors import RESUMES, ChildLost, RunError, UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sample to draw: a prompt, vLLM's parameters and adapter under a unique id in the engine's life."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # negative: the key of an image whose embedding stands there
    params: Any
    lora: Any  # None: no adapter
    begun: tuple[int, ...] = ()  # first tokens of the response, which an earlier request sampled
    is_first: bool = False  # before all requests that wait in the engine


class Aborted(RunError):
    """A request was dropped on demand."""


class EngineLoop:
    """Runs until `stop` or until the engine fails. Then every waiting and every later call raises RunError."""

    def __init__(
        self,
        build: Callable[[], Any],
        *,
        name: str,
        complete: Callable[[Any, Any], None] | None = None,
        images: ImageInputs | None = None,
    ) -> None:
        self.name = name
        self._images = images  # None: prompts are only text
        self._complete = complete  # gets the engine and each output finished in the last step
        self.last_step = time.monotonic()
        self.is_paused = False  # no step begins; set in this thread, by a call that must be repeated first
        self.on_step: Callable[[Sequence[Any]], None] | None = None  # gets all outputs of a step, in this thread
        self._build = build
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Any]] = {}
        self._stopped = False
        self.failure: RunError | None = None  # raised by every call since the engine failed
        self._engine: Any = None
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> Future[None]:
        """Build the engine in the thread. The future raises UserError if vLLM refuses arguments of the user."""
        self._thread.start()
        return self._started

    def call(self, work: Callable[[Any], T]) -> Future[T]:
        """Run `work(engine)` between two steps, when none is in flight."""

        def run(engine: Any) -> T:
            self._finish_steps()
            if self.failure is not None:
                raise self.failure
            return work(engine)

        return self._enqueue(run)

    def _enqueue(self, work: Callable[[Any], T]) -> Future[T]:
        """Run `work(engine)` before the next step begins."""
        future: Future[T] = Future()

        def run() -> None:
            if self.failure is not None:
                _fail([future], self.failure)
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(self._engine))
                except BaseException as error:
                    if self._is_lost(error):
                        self._fail_by(error)
                    future.set_exception(self.failure or error)
                    if not isinstance(error, Exception):
                        raise

        self._commands.put(run)
        return future

    def submit(self, submissions: Sequence[Submission]) -> list[Future[Any]]:
        """Start all requests in the same step, in this order, or no request if the engine refuses any.

        Each future gives vLLM's final RequestOutput.
        """
        futures: list[Future[Any]] = [Future() for _ in submissions]

        def add(engine: Any) -> None:
            added: list[str] = []
            try:
                for sample in submissions:
                    internal_id = engine.add_request(
                        sample.request_id,
                        {
                            **self._input_of(engine, [*sample.prompt_token_ids, *sample.begun]),
                            "cache_salt": engine.get_weight_version(),  # so that no block from other weights is reused
                        },
                        sample.params,
                        lora_request=sample.lora,
                    )
                    added.append(sample.request_id)
                    if sample.begun:
                        restore_output(engine, internal_id, sample.params, sample.prompt_token_ids, sample.begun)
                    if sample.is_first:
                        put_first(engine)
            except Exception:
                engine.abort_request(added)
                raise
            self._waiting.update(zip(added, futures, strict=True))

        self._enqueue(add).add_done_callback(lambda done: _fail(futures, done.exception()))
        return futures

    def _input_of(self, engine: Any, token_ids: list[int]) -> dict[str, Any]:
        if self._images is not None:
            return self._images.input_of(engine, token_ids)
        if min(token_ids, default=0) < 0:
            raise RunError(f"{self.name}: a prompt has an image, and the engine takes only text")
        return {"type": "token", "prompt_token_ids": token_ids}

    def abort(self, prefixes: Sequence[str], *, keeps: bool = False) -> Future[int]:
        """Drop the requests with an id that begins with a given prefix. Return the number of dropped requests.

        The futures of dropped requests raise Aborted, or give the unfinished outputs with `keeps`.
        """

        def abort(engine: Any) -> int:
            dropped = [request_id for request_id in self._waiting if request_id.startswith(tuple(prefixes))]
            for request_id in dropped if keeps else ():
                _give(self._waiting[request_id], output_so_far(engine, request_id))
            engine.abort_request(dropped)
            _fail([self._waiting.pop(request_id) for request_id in dropped], Aborted(f"{self.name}: aborted"))
            return len(dropped)

        return self._enqueue(abort)

    def stop(self, *, timeout_s: float) -> bool:
        """End the thread and the engine. Return whether both ended in time."""

        self._commands.put(partial(setattr, self, "_stopped", True))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._engine = self._build()
        except BaseException as error:
            kind = ChildLost if has_lost_device(error) else RunError
            self.failure = kind(f"{self.name} did not start: {_message(error)}")
            self.failure.__cause__ = error
            self._started.set_exception(error if isinstance(error, UserError) else self.failure)
            if not isinstance(error, Exception):
                raise
        else:
            self._started.set_result(None)
        while not self._stopped:
            self._take_commands()
            if self._has_work():
                self._step()
        _fail(list(self._waiting.values()), RunError(f"{self.name} was shut down"))
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    def _has_work(self) -> bool:
        return self.failure is None and not self.is_paused and bool(self._engine.has_unfinished_requests())

    def _take_commands(self) -> None:
        """Run all queued commands. Wait for a command if the engine has no work."""
        if not self._has_work():
            self._commands.get()()
        with contextlib.suppress(queue.Empty):
            while not self._stopped:
                self._commands.get_nowait()()

    def _finish_steps(self) -> None:
        """Finish the steps in flight, and begin none."""
        if has_step_in_flight(self._engine):
            with no_new_steps(self._engine):
                while self.failure is None and has_step_in_flight(self._engine):
                    self._step()

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
            self.last_step = time.monotonic()
            finished = [output for output in outputs if output.finished]
            if self._complete is not None:
                for output in finished:
                    self._complete(self._engine, output)
            if self.on_step is not None:
                self.on_step(outputs)
            for output in finished:
                _give(self._waiting.pop(output.request_id), output)
        except BaseException as error:
            self._fail_by(error)
            if not isinstance(error, Exception):
                raise

    def _is_lost(self, error: BaseException) -> bool:
        """Return whether the engine has lost its GPU or a worker process, and must be started again."""
        return isinstance(error, RuntimeError) and (has_lost_device(error) or has_lost_workers(self._engine))

    def _fail_by(self, error: BaseException) -> None:
        """Let every waiting and every later call fail. With ChildLost the driver starts the engine again."""
        worker = "a worker process has died; " if has_lost_workers(self._engine) else ""  # vLLM only says: cancelled
        reason = f"{self.name} died with {len(self._waiting)} requests in flight: {worker}{_message(error)}"
        self.failure = ChildLost(reason) if self._is_lost(error) else RunError(f"{reason}. {RESUMES}")
        self.failure.__cause__ = error
        _fail(list(self._waiting.values()), self.failure)
        self._waiting.clear()


def _message(error: BaseException) -> str:
    """Return vLLM's message and, after a lack of memory, the settings to change."""
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return f"{text} {advice_on_memory('rollout')}"
    if lacks_cache(error):
        return (
            f"{text} Here that is a higher cluster.roles.rollout.kv_cache_gib (on a CPU) or gpu_memory_utilization (on "
            "a GPU), or a lower rollouts.max_new_tokens."
        )
    return text


def _give(future: Future[Any], output: Any) -> None:
    if future.set_running_or_notify_cancel():  # False: the waiting caller gave up
        future.set_result(output)


def _fail(futures: Sequence[Future[Any]], error: BaseException | None) -> None:
    for future in futures if error is not None else ():
        if not future.done() and future.set_running_or_notify_cancel():  # the waiting caller may give up at any moment
            future.set_exception(error)
