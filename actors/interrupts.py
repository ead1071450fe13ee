"""SIGTERM as Ctrl-C, so that whatever ends a run ends it in order.

Also where it goes to all processes of the run at once, as `timeout`, Slurm and systemd send it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from actors.cluster import OWN_RAY


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, as batch systems and `ray job stop` send it, ends the run as Ctrl-C does: in order.

    The first one does; those that follow, as `timeout` sends two, would only disturb the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, frame: FrameType | None) -> None:
        """What Ctrl-C does; also where SIGINT is ignored, as shells have it for commands in the background."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        handler = signal.getsignal(signal.SIGINT)
        try:
            (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
        finally:  # second, so that no call that fails of it comes before the interrupt
            OWN_RAY.kill()

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
