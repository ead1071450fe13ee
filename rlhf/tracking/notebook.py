"""The output of a notebook's cell: one place for the newest log line and the display of a run.

Both are updated in place. This module imports IPython only if the kernel of a notebook runs this process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

_REFRESH_S = 0.5


def in_notebook() -> bool:
    """Return whether the kernel of a notebook runs this process."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class CellPlace:
    """The place in the current cell's output. Invariant: at most one display at a time has the place."""

    def __init__(self) -> None:
        self._handle: Any = None  # None: nothing is shown yet
        self._cell: int | None = None  # number of the execution
        self.is_taken = False  # by the display of a run

    def show(self, renderable: Any) -> None:
        """Show a renderable of rich in place of the last one. A new cell gets a new place."""
        from IPython import display, get_ipython

        cell = get_ipython().execution_count
        if self._handle is None or cell != self._cell:
            self._handle, self._cell = display.display(renderable, display_id=True), cell
        else:
            self._handle.update(renderable)

    def leave(self) -> None:
        """Let the shown output stay, and begin a new place below."""
        self._handle, self.is_taken = None, False


PLACE = CellPlace()


class Refresher:
    """Calls `refresh` twice a second in a thread, so that nobody waits for the notebook, until `stop`."""

    def __init__(self, refresh: Callable[[], object]) -> None:
        self._refresh, self._ends = refresh, threading.Event()
        self._thread = threading.Thread(target=self._run, name="notebook display", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.wait(_REFRESH_S):
            self._refresh()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()
        self._refresh()
