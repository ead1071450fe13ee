"""Signals end work and training loops, and an interrupt kills the process's local Ray."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from actors.cluster import preemption as interrupts
from actors.cluster.connect import OWN_RAY
from actors.cluster.preemption import run_loop
from rlhf.controller.notice import Notice
from rlhf.errors import Interrupted, Preempted, RunError, UserError
from rlhf.process import stopping
from rlhf.process.stopping import StopRequest, current_request, finishes_within, run_async, run_stoppable
from tests.fakes.calls import until


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Install handlers as in a terminal."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in stopping.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def loop_that_is_sent(*numbers: int, result: object = "done") -> Callable[[StopRequest], object]:
    """Return a loop that sees the first signal, and then sends the other signals."""

    def work(request: StopRequest) -> object:
        request.ends_by_itself = True
        send(numbers[0])
        wait_for(lambda: request.came is not None)
        for number in numbers[1:]:
            send(number)
            wait_for(request.interrupted.is_set)
        if isinstance(result, BaseException):
            raise result
        return result

    return work


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def test_the_work_has_its_own_thread_and_its_result_and_errors_arrive() -> None:
    assert run_stoppable(lambda _: threading.current_thread() is not threading.main_thread())
    assert run_stoppable(lambda outer: run_stoppable(lambda inner: inner is outer is current_request()))
    with pytest.raises(RunError, match="broken"):
        run_stoppable(Mock(side_effect=RunError("broken")))
    assert current_request() is None


def test_work_with_an_event_loop_runs_inside_of_a_running_one() -> None:
    async def cell_of_a_notebook() -> tuple[int, int]:
        return run_stoppable(lambda _: run_async(asyncio.sleep(0.0, 3))), run_async(asyncio.sleep(0.0, 4))

    assert asyncio.run(cell_of_a_notebook()) == (3, 4)


def test_a_runner_that_is_used_again_has_the_request_of_its_present_work() -> None:
    async def request_of_work() -> StopRequest | None:
        return current_request()

    with asyncio.Runner() as runner:
        for _ in range(2):
            assert run_stoppable(lambda request: run_async(request_of_work(), runner) is request)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("in_notebook", [False, True])
def test_a_loop_hears_a_signal_and_ends_by_itself(number: signal.Signals, in_notebook: bool) -> None:
    work = loop_that_is_sent(number, result=Preempted("a checkpoint of step 3 is written"))

    async def cell_of_a_notebook() -> None:
        run_stoppable(work)

    kind = KeyboardInterrupt if number == signal.SIGINT else Preempted
    with pytest.raises(kind, match=r"^a checkpoint of step 3 is written$"):
        asyncio.run(cell_of_a_notebook()) if in_notebook else run_stoppable(work)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_that_had_its_last_step_is_done_and_nothing_follows() -> None:
    assert run_stoppable(loop_that_is_sent(signal.SIGINT)) == "done"
    request = StopRequest()
    request.came = 1.0
    with pytest.raises(Preempted):
        request.raise_if_stopped()


def test_what_fails_after_a_signal_is_preempted_but_an_error_of_the_user_stays_one() -> None:
    with pytest.raises(Preempted, match="failed during the stop: a node is gone"):
        run_stoppable(loop_that_is_sent(signal.SIGTERM, result=RunError("a node is gone")))
    with pytest.raises(UserError, match="no such file"):
        run_stoppable(loop_that_is_sent(signal.SIGTERM, result=UserError("no such file")))


def test_a_signal_that_is_sent_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    received, receive = [], StopRequest._receive

    def count(request: StopRequest, number: int, frame: FrameType | None) -> None:
        receive(request, number, frame)
        received.append(number)

    def work(request: StopRequest) -> bool:
        request.ends_by_itself = True
        for times in (1, 2):
            send(signal.SIGTERM)
            wait_for(lambda times=times: len(received) == times)
        return request.interrupted.is_set()

    monkeypatch.setattr(StopRequest, "_receive", count)
    monkeypatch.setattr(stopping, "REPEATED_WITHIN_S", 60.0)
    assert run_stoppable(work) is False
    monkeypatch.setattr(stopping, "REPEATED_WITHIN_S", 0.0)
    with pytest.raises(Preempted, match="given up"):
        run_stoppable(loop_that_is_sent(signal.SIGTERM, signal.SIGTERM, result=KeyboardInterrupt()))


def test_handlers_and_alarms_of_a_library_are_replaced() -> None:
    """Ray sets a handler in C, and an alarm that would abort the process."""

    def work(request: StopRequest) -> bool:
        request.ends_by_itself = True
        ignore = ctypes.c_void_p(1)  # SIG_IGN, set from this thread as Ray sets its handler
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ignore)
        send(signal.SIGTERM)
        assert request.signal is None
        signal.alarm(1000)
        request.handlers_lost.set()
        give_up = time.monotonic() + 5.0
        while request.signal is None and time.monotonic() < give_up:
            send(signal.SIGTERM)
            time.sleep(0.005)
        return request.signal is signal.SIGTERM and signal.alarm(0) == 0

    assert run_stoppable(work)


@pytest.mark.parametrize(("first", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_a_second_ctrl_c_cancels_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, first: int, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(stopping, "PRESSED_AGAIN_AFTER_S", 0.0)
    cleaned_up, killed = threading.Event(), threading.Event()

    async def loop(request: StopRequest) -> None:
        request.ends_by_itself = True
        request.on_interrupt = killed.set
        send(first)
        while request.came is None:
            await asyncio.sleep(0.005)
        send(signal.SIGINT)
        try:
            await asyncio.sleep(60.0)
        finally:
            cleaned_up.set()

    with pytest.raises(kind, match="the work in progress was given up"):
        run_stoppable(lambda request: run_async(loop(request)))
    assert cleaned_up.is_set()
    assert killed.wait(60.0)


def test_other_work_is_interrupted_by_the_first_signal() -> None:
    ended = threading.Event()

    def work(_: StopRequest) -> None:
        send(signal.SIGTERM)
        try:
            while True:
                time.sleep(0.005)
        finally:
            ended.set()

    with pytest.raises(Preempted, match="given up"):
        run_stoppable(work)
    assert ended.is_set()


@pytest.mark.parametrize("presses", [1, 2])
def test_work_that_never_returns_to_python_is_left_behind(monkeypatch: pytest.MonkeyPatch, presses: int) -> None:
    monkeypatch.setattr(stopping, "END_WITHIN_S", 0.2 if presses == 1 else 60.0)
    monkeypatch.setattr(stopping, "PRESSED_AGAIN_AFTER_S", 0.0)
    stuck = threading.Lock()
    stuck.acquire()

    def press(request: StopRequest) -> None:
        send(signal.SIGINT)
        wait_for(request.interrupted.is_set)
        if presses == 2:
            send(signal.SIGINT)

    def work(request: StopRequest) -> None:
        threading.Thread(target=press, args=(request,)).start()
        stuck.acquire()  # like ray.shutdown, which waits for a stopped raylet

    with pytest.raises(KeyboardInterrupt, match="given up"):
        run_stoppable(work)
    assert stopping.has_stuck_threads()
    stuck.release()
    wait_for(lambda: not stopping.has_stuck_threads())


def test_a_call_that_does_not_return_in_time_is_not_waited_for() -> None:
    gate = threading.Event()
    assert not finishes_within(0.05, gate.wait, "gate")
    gate.set()
    assert finishes_within(60.0, gate.wait, "gate")
    with pytest.raises(RunError):
        finishes_within(60.0, Mock(side_effect=RunError("broken")), "broken")
    wait_for(lambda: not stopping.has_stuck_threads())


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does

    def work(request: StopRequest) -> bool:
        send(signal.SIGHUP)
        return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and request.came is None

    assert run_stoppable(work)


SCRIPT = """
import concurrent.futures, threading
from rlhf import cli, commands
from rlhf.process.stopping import start_thread
def run(args):
    hang = threading.Event().wait
    start_thread(lambda: concurrent.futures.ThreadPoolExecutor().submit(hang).result(), 'hangs')
    return 75
commands.COMMANDS['doctor'].run = run
cli.sys.argv = ['rlhf', 'doctor']
raise SystemExit(cli.main())
"""


def test_a_process_does_not_wait_for_a_call_that_never_returns() -> None:
    assert subprocess.run([sys.executable, "-c", SCRIPT], timeout=120).returncode == 75


def test_the_time_before_a_loop_begins_does_not_count_as_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and engines load for longer than the limit of a call of Ray."""
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.01)

    def work(request: StopRequest) -> str:
        time.sleep(1.2)  # loading
        request.beats_within_s = 1.0
        for _ in range(6):
            time.sleep(0.2)
            request.beats += 1
        return "trained"

    assert run_stoppable(work) == "trained"


Work = Callable[[Notice, StopRequest], Coroutine[Any, Any, object]]


def own_ray(monkeypatch: pytest.MonkeyPatch, *processes: psutil.Process) -> None:
    for name, value in (("daemons", list(processes)), ("vital", list(processes)), ("killed", False)):
        monkeypatch.setattr(OWN_RAY, name, value)


def test_an_interrupt_kills_the_own_ray_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    OWN_RAY.kill()
    assert not OWN_RAY.killed  # this process has no Ray
    asleep = "import time; time.sleep(60)"
    ray_like = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asleep!r}])"
    with subprocess.Popen([sys.executable, "-c", ray_like]) as daemon, subprocess.Popen(["sleep", "60"]) as other:
        known = psutil.Process(daemon.pid)
        while not known.children():
            time.sleep(0.02)
        (below,) = known.children()
        own_ray(monkeypatch, known)
        OWN_RAY.kill()
        assert OWN_RAY.killed
        assert OWN_RAY.is_ending
        assert not known.is_running()
        assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None
        other.kill()


def test_what_ray_cannot_do_without_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own_ray(monkeypatch)
    with subprocess.Popen(["sleep", "60"]) as other:
        before = psutil.Process().children()
        monkeypatch.setattr("actors.cluster.connect.VITAL", {"tail"})
        with subprocess.Popen(["sleep", "60"]) as log, subprocess.Popen(["tail", "-f", "/dev/null"]) as raylet:
            OWN_RAY.find(before)
            assert {daemon.pid for daemon in OWN_RAY.daemons} == {log.pid, raylet.pid}
            for daemon, is_vital in ((log, False), (raylet, True)):
                daemon.kill()
                daemon.wait()
                assert OWN_RAY.is_ending == is_vital
        other.kill()


@pytest.mark.parametrize("is_told", [False, True])
def test_a_loop_does_not_outlive_its_ray(monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    monkeypatch.setattr(interrupts, "TOLD_WITHIN_S", 0.3)
    with subprocess.Popen(["sleep", "60"]) as raylet:
        own_ray(monkeypatch, psutil.Process(raylet.pid))

        async def work(notice: Notice, request: StopRequest) -> None:
            raylet.kill()
            if is_told:  # a signal came to all processes
                ask(request, signal.SIGTERM)
            await asyncio.sleep(60.0)

        expected = Preempted if is_told else RunError
        with pytest.raises(expected, match=r"the run's local Ray (was ended too|has died)"):
            run(work)
        assert OWN_RAY.killed


@pytest.mark.parametrize("returns", [False, True])
def test_a_call_that_blocks_the_event_loop_has_a_limit(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    monkeypatch.setattr(stopping, "END_WITHIN_S", 5.0 if returns else 0.1)
    gate = threading.Event()

    async def hang() -> None:
        gate.wait(30.0)  # like `ray.put`, which waits for a stopped raylet

    def work(request: StopRequest) -> None:
        if returns:
            request.on_interrupt = gate.set  # the end of Ray's daemons may end the call like this
        loop = run_loop(hang(), Notice(), request, grace_s=1.0, call_timeout_s=1.0, draining_node=none_goes)
        run_async(loop)

    with pytest.raises(RunError, match=r"waited for \d s \(cluster.call_timeout_s\) in a call of Ray"):
        run_stoppable(work)
    gate.set()


async def none_goes() -> None:
    return None


def run(
    work: Work,
    *,
    grace_s: float = 60.0,
    draining_node: Callable[[], Awaitable[tuple[str, float | None] | None]] = none_goes,
) -> StopRequest:
    """Run a loop, and return the loop's stop request."""
    request = StopRequest()

    async def loop() -> None:
        notice = Notice()
        timeouts = {"grace_s": grace_s, "call_timeout_s": 60.0}
        await run_loop(work(notice, request), notice, request, **timeouts, draining_node=draining_node)

    asyncio.run(loop())
    return request


def ask(request: StopRequest, number: signal.Signals) -> None:
    request.signal, request.came = number, time.monotonic()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("has_last_step", [False, True])
def test_a_loop_is_given_notice_and_ends_by_itself(number: signal.Signals, has_last_step: bool) -> None:
    async def work(notice: Notice, request: StopRequest) -> None:
        assert request.ends_by_itself
        ask(request, number)
        await until(lambda: notice.is_given)
        if not has_last_step:
            raise Preempted("kept")

    with nullcontext() if has_last_step else pytest.raises(Preempted, match=r"^kept$"):
        assert not run(work).ends_by_itself


def test_after_sigterm_a_step_has_a_limit_and_after_ctrl_c_it_has_none() -> None:
    async def slow(notice: Notice, request: StopRequest, number: signal.Signals, takes_s: float) -> None:
        ask(request, number)
        await asyncio.sleep(takes_s)

    with pytest.raises(Preempted, match=r"not finished within 0.1 s \(train.preemption_grace_s, or less\)"):
        run(lambda notice, request: slow(notice, request, signal.SIGTERM, 60.0), grace_s=0.1)
    run(lambda notice, request: slow(notice, request, signal.SIGINT, 0.5), grace_s=0.1)


@pytest.mark.parametrize(("left_s", "takes_s"), [(0.9, 60.0), (-5.0, 0.5)], ids=["goes", "this clock is ahead"])
def test_a_node_that_is_to_go_is_a_notice_too(monkeypatch: pytest.MonkeyPatch, left_s: float, takes_s: float) -> None:
    monkeypatch.setattr(interrupts, "ASK_EVERY_S", 0.0)

    async def goes() -> tuple[str, float | None]:
        return "10.0.0.7", time.time() + left_s

    async def work(notice: Notice, _: StopRequest) -> None:
        await until(lambda: notice.is_given)
        await asyncio.sleep(takes_s)

    is_cut = left_s > 0.0
    with pytest.raises(Preempted, match=r"not finished within 0\.\d+ s") if is_cut else nullcontext():
        run(work, draining_node=goes)


def test_a_head_that_does_not_answer_delays_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ASK_EVERY_S", 0.0)
    asked = 0

    async def hangs() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60.0)

    async def work(notice: Notice, request: StopRequest) -> None:
        await until(lambda: asked == 1)
        ask(request, signal.SIGTERM)
        await until(lambda: notice.is_given)

    run(work, draining_node=hangs)
    assert asked == 1


async def test_work_is_cut_off_by_a_notice_and_else_gives_its_result() -> None:
    notice, cut = Notice(), asyncio.Event()

    async def slow() -> int:
        try:
            return await asyncio.sleep(60.0, 4)
        finally:
            cut.set()

    assert await notice.unless_given(asyncio.sleep(0.0, 3)) == 3
    asyncio.get_running_loop().call_later(0.01, notice.give)
    assert await notice.unless_given(slow()) is None
    assert cut.is_set()


def test_an_interrupt_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is imported in part would break the next call in a notebook."""
    text = "import time\nfor _ in range(20):\n    time.sleep(0.05)\nwhole = True\n"
    (tmp_path / "slowly_imported.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def work(_: StopRequest) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        importlib.import_module("slowly_imported")
        while True:
            time.sleep(0.01)

    with pytest.raises(Interrupted):
        run_stoppable(work)
    assert vars(sys.modules.pop("slowly_imported"))["whole"]


INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "rlhf.commands.convert":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_during_the_first_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    ended = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", "doctor"], env=env, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (130, "rlhf: interrupted\n")
