"""What SIGTERM does: once, and to the Ray that the process has started itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from actors.cluster import OWN_RAY
from actors.interrupts import sigterm_interrupts


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
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert OWN_RAY.killed
        assert not known.is_running()
        assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None
        other.kill()


def test_where_ray_is_not_our_own_nothing_is_killed() -> None:
    with sigterm_interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not OWN_RAY.killed
