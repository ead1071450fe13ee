"""What SIGTERM does: to a loop that heeds it, to what else runs, and to the Ray that the process has started itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import psutil
import pytest

from actors import interrupts
from actors.cluster import OWN_RAY
from actors.interrupts import Sigterm, heeding, sigterm_interrupts, sigterm_preempts
from rlhf.controller.notice import Notice
from rlhf.errors import Preempted, RunError


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Signals as a program finds them that starts in one: a shell has SIGINT ignored in the background, Ray hears
    SIGTERM itself where it was begun before."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_kills_the_own_ray_with_what_it_started_and_only_the_first_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asleep = "import time; time.sleep(60)"
    ray_like = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asleep!r}])"
    with subprocess.Popen([sys.executable, "-c", ray_like]) as daemon, subprocess.Popen(["sleep", "60"]) as other:
        known = psutil.Process(daemon.pid)
        while not known.children():
            time.sleep(0.02)
        (below,) = known.children()
        monkeypatch.setattr(OWN_RAY, "daemons", [known])
        monkeypatch.setattr(OWN_RAY, "killed", False)
        with sigterm_interrupts():
            with pytest.raises(KeyboardInterrupt):
                terminate()
            terminate()
        assert OWN_RAY.killed
        assert OWN_RAY.is_ending
        assert not known.is_running()
        assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None
        other.kill()


def test_where_ray_is_not_our_own_nothing_is_killed() -> None:
    with sigterm_interrupts(), pytest.raises(KeyboardInterrupt):
        terminate()
    assert not OWN_RAY.killed


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def none_leaves() -> None:
    return None


def run(
    work: Callable[[Notice], object],
    *,
    grace_s: float = 60.0,
    leaving: Callable[[], Awaitable[tuple[str, float | None] | None]] = none_leaves,
) -> None:
    """A loop of a run."""

    async def loop() -> None:
        notice = Notice()
        await heeding(work(notice), notice, told, grace_s=grace_s, leaving=leaving)  # type: ignore[arg-type]

    with sigterm_preempts() as told:
        asyncio.run(loop())


def test_a_loop_is_given_notice_and_ends_by_itself() -> None:
    async def work(notice: Notice) -> None:
        terminate()
        terminate()  # as `timeout` does
        await until(lambda: notice.is_given)
        raise Preempted("kept")

    with pytest.raises(Preempted, match=r"^kept$"):
        run(work)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_that_does_its_last_step_is_not_preempted_but_nothing_follows() -> None:
    async def work(notice: Notice) -> None:
        terminate()
        await until(lambda: notice.is_given)

    run(work)
    with pytest.raises(Preempted, match="what was begun is done"):
        Sigterm(came=1.0).refuse_more()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_loop_at_once(monkeypatch: pytest.MonkeyPatch, second: signal.Signals) -> None:
    monkeypatch.setattr(interrupts, "SAME_S", 0.0)

    async def work(notice: Notice) -> None:
        terminate()
        await until(lambda: notice.is_given)
        os.kill(os.getpid(), second)
        await asyncio.sleep(60.0)

    with pytest.raises(Preempted, match="what was at work is given up"):
        run(work)


def test_a_loop_that_is_not_done_in_time_is_cut_off() -> None:
    async def work(notice: Notice) -> None:
        terminate()
        await asyncio.sleep(60.0)

    with pytest.raises(Preempted, match=r"not done in 0.1 s \(train.preemption_grace_s, or less\)"):
        run(work, grace_s=0.1)


def test_a_node_that_is_to_go_is_a_notice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ASK_EVERY_S", 0.0)

    async def goes() -> tuple[str, float | None]:
        return "10.0.0.7", time.time() + 0.3

    async def work(notice: Notice) -> None:
        await until(lambda: notice.is_given)
        await asyncio.sleep(60.0)

    with pytest.raises(Preempted, match=r"not done in 0\.[23]\d* s"):
        run(work, leaving=goes)


def test_what_fails_after_the_notice_is_preempted_too() -> None:
    async def work(notice: Notice) -> None:
        terminate()
        raise RunError("a node is gone")

    with pytest.raises(Preempted, match="failed meanwhile: a node is gone"):
        run(work)


def test_sigterm_is_heard_again_where_a_library_has_taken_it() -> None:
    def lost_and_found() -> None:
        with sigterm_preempts() as told:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            terminate()
            told.listen()
            terminate()

    with pytest.raises(Preempted, match="given up"):
        lost_and_found()


def test_what_heeds_no_notice_is_interrupted() -> None:
    with pytest.raises(Preempted, match="given up"), sigterm_preempts():
        terminate()
    with pytest.raises(KeyboardInterrupt), sigterm_preempts():
        os.kill(os.getpid(), signal.SIGINT)


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
