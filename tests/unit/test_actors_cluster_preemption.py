"""A stop request ends a training loop, and an interrupt kills the process's local Ray."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext
from typing import Any

import psutil
import pytest

from actors.cluster import preemption as interrupts
from actors.cluster.connect import OWN_RAY
from actors.cluster.preemption import run_loop
from rlhf.controller.notice import Notice
from rlhf.errors import Preempted, RunError
from rlhf.process import stopping
from rlhf.process.stopping import StopRequest, run_async, run_stoppable
from tests.fakes.calls import until

Work = Callable[[Notice, StopRequest], Coroutine[Any, Any, object]]


def own_ray(monkeypatch: pytest.MonkeyPatch, *processes: psutil.Process) -> None:
    for name, value in (("daemons", list(processes)), ("vital", list(processes)), ("killed", False)):
        monkeypatch.setattr(OWN_RAY, name, value)


def test_an_interrupt_kills_the_own_ray_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    OWN_RAY.kill()
    assert not OWN_RAY.killed  # there is none
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
        gate.wait(30.0)  # as `ray.put` waits for a raylet that stands still

    def work(request: StopRequest) -> None:
        if returns:
            request.on_interrupt = gate.set  # as the end of Ray's daemons may end the call
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


def test_work_is_cut_off_by_a_notice_and_else_gives_its_result() -> None:
    async def both() -> tuple[int | None, int | None, bool]:
        notice, cut = Notice(), False

        async def quick() -> int:
            return 3

        async def slow() -> int:
            nonlocal cut
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                cut = True
                raise
            return 4

        first = await notice.unless_given(quick())
        asyncio.get_running_loop().call_later(0.01, notice.give)
        return first, await notice.unless_given(slow()), cut

    assert asyncio.run(both()) == (3, None, True)
