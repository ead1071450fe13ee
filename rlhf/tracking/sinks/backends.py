"""The interface of the tracker's back ends, and a thread for each back end. The loop never waits for a back end.

A back end is a view of the run folder elsewhere: W&B, TensorBoard, Prometheus. The driver hands over steps. A failing
back end does not affect the run. This module does not choose the logged values.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.extensions import summarize
from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.logs import redact
from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.tracking.run_folder.samples import samples_path

logger = logging.getLogger(__name__)

CLOSE_WITHIN_S = 90.0  # more than any back end gives itself
MOST_WAITING = 256  # calls; a slower back end misses some


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedStep:
    """One step as stored in the run folder."""

    folder: Path
    step: int
    metrics: Mapping[str, float | None]  # None: not finite
    histograms: Mapping[str, Histogram]

    def samples(self) -> list[dict[str, Any]]:
        """Return the step's rows of samples/, read now, or an empty list."""
        return read_lines(samples_path(self.folder, self.step))


class TrackerBackend:
    """A view of the run folder elsewhere. All calls come from one thread. An exception ends only this view.

    A back end overrides the needed methods: here all methods do nothing.
    """

    name: str  # in messages
    file: str | None = None  # of a user's code, for the place of an error

    def log(self, step: TrackedStep) -> None:
        """Log one step. Steps rise, but after a resume some may come again."""

    def alert(self, severity: Severity, title: str, text: str) -> None:
        """Send an alert to the user once."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """Store a whole checkpoint. The run may remove the files once the next checkpoint is stored."""

    def close(self, *, failed: bool) -> None:
        """Hand over the rest within CLOSE_WITHIN_S. The run folder's files are all closed."""


class Relay:
    """A back end on a separate thread. The first failure causes a warning, and ends all calls of the back end."""

    def __init__(self, backend: TrackerBackend, *, close_within_s: float = CLOSE_WITHIN_S) -> None:
        self._backend, self._close_within_s = backend, close_within_s
        self._calls: queue.Queue[tuple[str, Callable[[TrackerBackend], None]] | None] = queue.Queue(MOST_WAITING)
        self._broken = self._missed = False
        self._thread = threading.Thread(target=self._work, name=f"tracking {backend.name}", daemon=True)
        self._thread.start()

    def call(self, action: str, method: Callable[[TrackerBackend], None]) -> None:
        """Queue a call for the thread. `action` is for messages."""
        try:
            self._calls.put_nowait((action, method))
        except queue.Full:
            if not (self._missed or self._broken):
                logger.warning(
                    "%s is slow: %d calls wait, so further calls are dropped, but metrics.jsonl has all values",
                    self._backend.name,
                    MOST_WAITING,
                )
            self._missed = True

    def close(self, *, failed: bool) -> None:
        """Let the back end finish the queue, or leave the back end at the deadline."""
        end = time.monotonic() + self._close_within_s
        with suppress(queue.Full):
            self._calls.put(("finishing", lambda backend: backend.close(failed=failed)), timeout=self._close_within_s)
            self._calls.put(None, timeout=max(end - time.monotonic(), 0.0))
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            message = "%s did not finish within %.0f s, so it is abandoned: metrics.jsonl has all values"
            logger.warning(message, self._backend.name, self._close_within_s)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._broken:
                continue
            try:
                call[1](self._backend)
            except Exception as error:  # noqa: BLE001  (any failure ends only this view)
                self._broken = True
                message = "%s failed while %s: %s. The run continues without it: metrics.jsonl has all values."
                text, file = f"{type(error).__name__}: {error}", self._backend.file
                text = text if file is None else summarize(error, file)
                logger.warning(message, self._backend.name, call[0], redact(text).rstrip("."))
