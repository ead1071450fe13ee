"""Open the progress display of a run: live bars on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rlhf.tracking.display.progress import Mode, Progress
from rlhf.tracking.formatting import number

if TYPE_CHECKING:
    pass


_HEARTBEAT_S = 60.0  # between plain lines within one step


def open_progress(
    total_steps: int,
    *,
    done_steps: int = 0,
    show: Sequence[str] = (),
    mode: Mode = "auto",
    run: str = "",
    folder: Path | None = None,
    stream: TextIO | None = None,
) -> Progress:
    """Return the display for `mode`. `auto` picks the display that suits stderr (or `stream`).

    Args:
        done_steps: the steps that an earlier start completed.
        show: the metrics to show, in this order, if a step has them.
        run: the name of the run.
        folder: the run folder, for its samples. None: show no samples.
    """
    if mode == "quiet":
        return Progress(total_steps, done_steps, show)
    if mode == "json":
        from rlhf.tracking.display.progress_json import JsonProgress

        return JsonProgress(total_steps, done_steps, show, run, folder, sys.stdout if stream is None else stream)
    out = sys.stderr if stream is None else stream
    if out.isatty():
        from rlhf.tracking.display.progress_live import LiveProgress

        return LiveProgress(total_steps, done_steps, show, run, folder, stream)
    return LineProgress(total_steps, done_steps, show, run, out)


class LineProgress(Progress):
    """Writes a heading and one line a step. Within a long step it writes one line a minute."""

    def __init__(self, total_steps: int, done_steps: int, show: Sequence[str], run: str, stream: TextIO) -> None:
        super().__init__(total_steps, done_steps, show, run)
        self._stream = stream
        self._say(f"{run}: {total_steps} steps" + (f", of which {done_steps} are done" if done_steps else ""))

    def note(self, text: str) -> None:
        self._say(text)

    def _shown(self, *, entered: bool) -> None:
        if time.monotonic() - self._last_line >= _HEARTBEAT_S:
            self._say(f"{self._where()}: {self._doing()}")

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = "".join(f"  {key} {number(value)}" for key, value in self._numbers.items())
        where = f"step {step}/{self._total}" if step > 0 else "before training"
        self._say(f"{where}{numbers}{self._left()}")

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
        self._last_line = time.monotonic()
