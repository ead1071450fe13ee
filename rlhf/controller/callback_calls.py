"""Call the callbacks of a run, on the driver.

The calls have one thread, so a slow callback blocks neither the event loop nor a signal. The loop waits for each call,
up to the callback's limit. This module does not decide what a stop does to the run.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

from rlhf.errors import RunError
from rlhf.extensions import describe_frames, summarize
from rlhf.passed_objects import code_file
from rlhf.tracking.callbacks import Callback, StopRun
from rlhf.tracking.logs import redact
from rlhf.tracking.sinks.installed import TrackedRun

logger = logging.getLogger(__name__)

Outcome: TypeAlias = "Future[BaseException | None]"
SLOW_AFTER_S = 30.0  # after which the place of a call is logged


class CallbackFailed(RunError):
    """A callback raised an exception, or did not return in time. The message names the place in the callback."""


class CallbackCalls:
    """The callbacks of one stage. `stopped` is the sentence about the callback that stopped the stage."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self.stopped: str | None = None
        self._calls: queue.SimpleQueue[tuple[Outcome, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="callbacks", daemon=True)

    @asynccontextmanager
    async def following(self, run: TrackedRun) -> AsyncGenerator[None]:
        """Call `on_start` and `on_end` around the block. After an error, a failing `on_end` is only logged."""
        self._thread.start()
        try:
            await self.call("on_start", run)
            try:
                yield
            except Exception as error:
                try:
                    await self.call("on_end", error)
                except CallbackFailed as second:
                    logger.warning("%s", second)
                raise
            await self.call("on_end", None)
        finally:
            self._calls.put(None)

    async def call(self, event: str, *args: Any) -> None:
        """Call a method of all callbacks in order. CallbackFailed: the first failure."""
        for callback in self._callbacks:
            name = f"{type(callback).__name__}.{event}"
            try:
                await self._call(callback, name, partial(getattr(callback, event), *args))
            except StopRun as stop:
                reason = redact(" ".join(str(stop).split()))
                self.stopped = self.stopped or f"the callback `{name}` stops the run{reason and ': ' + reason}"
            except CallbackFailed:
                self._callbacks = tuple(other for other in self._callbacks if other is not callback)
                raise

    async def _call(self, callback: Callback, name: str, call: Callable[[], object]) -> None:
        future: Outcome = Future()
        self._calls.put((future, call))
        waiting, began = asyncio.wrap_future(future), time.monotonic()
        while not waiting.done():
            left_s = callback.timeout_s - (time.monotonic() - began)
            try:
                await asyncio.wait({waiting}, timeout=max(min(SLOW_AFTER_S, left_s), 0.0))
            except asyncio.CancelledError:
                self._callbacks = ()  # the thread may be stuck, and the run is ending
                raise
            late_s = time.monotonic() - began
            if waiting.done():
                break
            place = self._place(callback)
            if late_s >= callback.timeout_s:
                self._callbacks = ()  # the thread is stuck
                raise CallbackFailed(
                    f"the callback `{name}` did not return within {callback.timeout_s:g} s{place}. The limit is its "
                    "attribute `timeout_s`."
                )
            logger.warning("the callback `%s` has run for %.0f s%s, and the run waits for it", name, late_s, place)
        error = waiting.result()
        if isinstance(error, StopRun):
            raise error
        if error is not None:
            text = redact(summarize(error, code_file(callback)))
            raise CallbackFailed(f"the callback `{name}` raised {text}.") from error

    def _place(self, callback: Callback) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_stack(frame)]
        place = describe_frames(frames, code_file(callback))
        return f", at {place}" if place else ""

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            future.set_running_or_notify_cancel()
            try:
                call()
            except BaseException as error:  # noqa: BLE001  sys.exit too ends the run with a message
                future.set_result(error)
            else:
                future.set_result(None)
