"""Handle signals that end the work of this process, and run the work in a thread.

The main thread only waits for signals, so a C call that never returns cannot block the signals. The work can start
event loops even in a notebook. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are handled, unless ignored as under `nohup`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rlhf.errors import Interrupted, Preempted, RunError, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
REPEATED_WITHIN_S = 2.0  # `timeout` sends a signal twice: to the process, and to the process group
PRESSED_AGAIN_AFTER_S = 0.1  # Ctrl-C signals further apart than this count separately
LOOK_EVERY_S = 0.1
END_WITHIN_S = 15.0  # limit for an orderly end of interrupted work
IMPORTED_WITHIN_S = 60.0  # an interrupt waits for an import: half a module would break the next call of a notebook
EXIT_WITHIN_S = 5.0
_NOTHING_FOLLOWS = threading.Event()
_PREFIX = "rlhf: "  # prefix of this module's thread names


class StopRequest:
    """The request to end the work of `run_stoppable`.

    The first signal counts; later signals only make the request urgent. A training loop and a server set
    `ends_by_itself` while running: both look at `came`, finish the work in progress and end. Only a second signal
    interrupts such work. For all other work, the first signal interrupts.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.came: float | None = None  # on the monotonic clock; also set for a draining node
        self.ends_by_itself = False
        self.interrupted = threading.Event()
        self.given_up = threading.Event()  # the caller no longer waits for the work
        self.beats = 0  # incremented by a running loop
        self.beats_within_s = math.inf  # a loop silent for longer counts as hanging
        self.hung_s: float | None = None  # how long a hung loop was silent
        self.handlers_lost = threading.Event()  # set by work in which a library replaces the handlers in C
        self.on_interrupt: Callable[[], object] = lambda: None  # ends processes that would delay interrupted work
        self._cancel: Callable[[], object] | None = None  # cancels the event loop's main task
        self._last = -REPEATED_WITHIN_S

    def raise_if_stopped(self) -> None:
        """Raise Preempted if the request came, so that nothing new is begun."""
        if self.came is not None:
            raise Preempted("nothing was in progress")

    def run(self, work: Coroutine[Any, Any, T], runner: asyncio.Runner) -> T:
        """Run a coroutine, and cancel it on an interrupt."""
        loop = runner.get_loop()

        async def cancellable() -> T:
            task = asyncio.current_task()
            assert task is not None
            _REQUEST.set(self)  # a runner keeps the context of its first run
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.interrupted.is_set():
                task.cancel()
            return await work

        try:
            return runner.run(cancellable())
        except asyncio.CancelledError:
            if not self.interrupted.is_set():
                raise
            raise KeyboardInterrupt from None
        finally:
            self._cancel = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        signal.alarm(0)  # cancel a possible alarm of Ray's handler, which would abort the process in 3 s
        now = time.monotonic()
        again_after_s = PRESSED_AGAIN_AFTER_S if number == signal.SIGINT else REPEATED_WITHIN_S
        if self.signal is not None and now - self._last < again_after_s:
            return
        self._last = now
        if self.signal is None:
            self.signal, self.came = signal.Signals(number), self.came or now
            if self.ends_by_itself:
                return
        elif self.interrupted.is_set():
            self.given_up.set()
        self.interrupted.set()


_REQUEST: ContextVar[StopRequest | None] = ContextVar("the stop request of the work", default=None)


def current_request() -> StopRequest | None:
    """Return the request of the work. `asyncio.to_thread` passes the request on. None outside of `run_stoppable`."""
    return _REQUEST.get()


def run_stoppable(work: Callable[[StopRequest], T]) -> T:
    """Run work in a thread until it is done or a signal ends it. Nested calls join the outer call.

    Raises:
        Interrupted: Ctrl-C ended the work. The text names the stored results.
        Preempted: another signal ended the work. The text names the stored results.
        RunError: the event loop of the work hangs.
    """
    outer = current_request()
    if outer is not None:
        return work(outer)
    request = StopRequest()

    def begin() -> T:
        _REQUEST.set(request)
        return work(request)

    with contextlib.ExitStack() as stack:
        listen = stack.enter_context(_listening(request))
        outcome, thread = start_thread(begin, "work")
        stack.enter_context(_again_if_lost(thread))
        deadline: float | None = None
        beats, silent_s, importing_s = request.beats, 0.0, 0.0
        while thread.is_alive() and not request.given_up.is_set():
            thread.join(LOOK_EVERY_S)
            if request.handlers_lost.is_set():
                request.handlers_lost.clear()
                listen()
            limit_s = request.beats_within_s
            is_silent = request.beats == beats and limit_s < math.inf  # before its first beat a loop is not silent
            silent_s = silent_s + LOOK_EVERY_S if is_silent else 0.0  # the time of a stopped process does not count
            beats = request.beats
            if silent_s > limit_s:
                request.hung_s = silent_s
                request.interrupted.set()
            if request.interrupted.is_set() and deadline is None:
                if not _NOTHING_FOLLOWS.is_set() and importing_s < IMPORTED_WITHIN_S and _imports(thread):
                    importing_s += LOOK_EVERY_S
                    continue
                deadline = time.monotonic() + END_WITHIN_S
                _interrupt(thread, request)
            elif deadline is not None and time.monotonic() > deadline:
                request.given_up.set()
    return _result(outcome, request)


def run_async(work: Coroutine[Any, Any, T], runner: asyncio.Runner | None = None) -> T:
    """Run a coroutine as `asyncio.run` does, with cancellation if `run_stoppable` is interrupted.

    If the caller already runs an event loop, the coroutine gets a separate thread.
    """
    request = current_request()
    if request is None and asyncio._get_running_loop() is not None:
        return run_stoppable(lambda _: run_async(work, runner))
    with contextlib.ExitStack() as stack:
        used = runner or stack.enter_context(asyncio.Runner())
        return used.run(work) if request is None else request.run(work, used)


def start_thread(call: Callable[[], T], name: str) -> tuple[Future[T], threading.Thread]:
    """Start a call that may never return, in a daemon thread. See `leave_stuck_threads`."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001  whoever waits for the result raises it
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=run, name=f"{_PREFIX}{name}", daemon=True)
    thread.start()
    return future, thread


def finishes_within(limit_s: float, call: Callable[[], object], name: str) -> bool:
    """Run a call that may never return, and wait. Return False after the limit."""
    future, thread = start_thread(call, name)
    thread.join(limit_s)
    if thread.is_alive():
        return False
    future.result()
    return True


def end_process_after_work() -> None:
    """Declare that this process ends after its work. So an interrupt does not wait for an import."""
    _NOTHING_FOLLOWS.set()


def leave_stuck_threads(code: int) -> None:
    """Exit immediately if a call of this module has not returned, because Python itself would wait for it."""
    if has_stuck_threads():
        leave(code)


def leave(code: int) -> NoReturn:
    """Exit after the exit handlers of Python, without the exit of C libraries, which may crash in interrupted calls."""
    finishes_within(EXIT_WITHIN_S, atexit._run_exitfuncs, "exit handlers")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_stuck_threads() -> bool:
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())


@contextmanager
def _listening(request: StopRequest) -> Iterator[Callable[[], None]]:
    """Handle the signals in the block, and yield a call that sets the handlers again. Requires the main thread."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def listen() -> None:
        for number in before:
            signal.signal(number, request._receive)

    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def _imports(thread: threading.Thread) -> bool:
    """Return whether a thread is importing a module."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _interrupt(thread: threading.Thread, request: StopRequest) -> None:
    """Cancel the thread's event loop, or raise KeyboardInterrupt in its Python code."""
    try:
        if (cancel := request._cancel) is not None:  # the thread may clear `_cancel` at any moment
            cancel()
        else:
            _raise_in(thread)
    except RuntimeError:  # the loop has just closed; the next loop is interrupted at the start
        logger.debug("the event loop ended before it was cancelled")
    start_thread(request.on_interrupt, "on interrupt")


def _raise_in(thread: threading.Thread) -> None:
    identity = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(KeyboardInterrupt))


@contextmanager
def _again_if_lost(thread: threading.Thread) -> Iterator[None]:
    """Interrupt the thread again if Python has dropped the KeyboardInterrupt, as in a callback of the collector."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt and threading.current_thread() is thread:
            threading.Timer(LOOK_EVERY_S, _raise_in, [thread]).start()  # not within the callback, which would drop it
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _result(outcome: Future[T], request: StopRequest) -> T:
    """Return the work's result, or raise the exception for the signal received."""
    error: BaseException | None = KeyboardInterrupt() if not outcome.done() else outcome.exception()
    if error is None:
        return outcome.result()
    if request.signal is None and request.hung_s is not None:
        raise RunError(
            f"the driver waited for {request.hung_s:.0f} s (cluster.call_timeout_s) in a call of Ray, whose daemons do "
            "not answer. The run can be resumed with --resume auto."
        ) from error
    if request.signal is None or isinstance(error, UserError):
        raise error
    is_failure = isinstance(error, Exception) and not isinstance(error, Preempted)
    text = f"the work in progress failed during the stop: {error}" if is_failure else str(error)
    kind = Interrupted if request.signal is signal.SIGINT else Preempted
    raise kind(text or "the work in progress was given up") from error
