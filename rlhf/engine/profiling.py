"""Profile of one process in one step by torch.profiler, written as a Chrome trace for Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class StepProfiler:
    """Records the operations of the calling thread and, on a GPU, of the device. `start` and `stop` are called by the
    thread that computes."""

    def __init__(self) -> None:
        self._running: Any = None

    def start(self) -> None:
        """Begin a profile. A profile in progress, whose step was repeated, is dropped."""
        from torch.profiler import profile

        self.drop()
        self._running = profile()
        self._running.start()

    def stop(self, path: Path) -> None:
        """Write the profile to a new .json.gz file. No effect without a profile, as in a new process."""
        running = self._running
        self.drop()
        if running is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))

    def drop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = None
