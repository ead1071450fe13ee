"""The terminal's view of a run: a live display, one plain line a step, or JSON lines.

The live display has bars, a step table and the last sample. The driver writes to stderr, and JSON lines to stdout. The
display shows numbers computed elsewhere and decides nothing: a run is the same without it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rlhf.tracking.formatting import duration
from rlhf.tracking.run_folder.samples import last_sample

if TYPE_CHECKING:
    from rlhf.tracking.diagnosis.findings import Finding

Mode = Literal["auto", "json", "quiet"]
_PACE_STEPS = 20  # steps over which the pace is taken


@dataclass(slots=True)
class StageTime:
    """The current stage of the running step."""

    done: int = 0
    total: int = 0  # 0: not counted
    seconds: float = 0.0  # until it was last left
    since: float | None = None  # when it was entered; None: another stage is running


class Progress:
    """The interface, and the quiet form of it: keeps count and shows nothing."""

    def __init__(
        self, total_steps: int, done_steps: int, show: Sequence[str], run: str = "", folder: Path | None = None
    ) -> None:
        self._total = total_steps
        self._done = done_steps
        self._current: int | None = None  # the step in progress; 0: the evaluation before training
        self._show = tuple(show)
        self._run = run
        self._folder = folder
        self._ends = deque([time.monotonic()], maxlen=_PACE_STEPS + 1)
        self._stage = ""
        self._stages: dict[str, StageTime] = {}
        self._numbers: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Begin a step. Step 0 is the evaluation before training."""
        self._current = step

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        """Show the current stage and its progress (`rollouts 37/64`). A total of 0 means not counted."""
        now, entered = time.monotonic(), name != self._stage
        if entered:
            self._leave(now)
            self._stage = name
        stage = self._stages.setdefault(name, StageTime())
        stage.done, stage.total = done, total
        if stage.since is None:
            stage.since = now
        self._shown(entered=entered)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record that a step is done. Step 0, the evaluation before training, does not count."""
        self._leave(time.monotonic())
        self._numbers |= {key: metrics[key] for key in self._show if key in metrics}
        if step > 0:
            self._done = step
            self._ends.append(time.monotonic())
        else:
            self._ends[-1] = time.monotonic()
        self._stepped(step, metrics)
        self._stage, self._stages = "", {}

    def note(self, text: str) -> None:
        """Write a line that stays on the terminal."""

    def finding(self, finding: Finding) -> None:
        """Show a problem once. The log has it too."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shown(self, *, entered: bool) -> None:
        """Update the display after a change of the stage or of its progress."""

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the display at the end of a step, while its stages are still known."""

    def _leave(self, now: float) -> None:
        stage = self._stages.get(self._stage)
        if stage is not None and stage.since is not None:
            stage.seconds += now - stage.since
            stage.since = None

    def _left_s(self) -> float | None:
        """Return the seconds left at the pace of the last steps."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._total - self._done)

    def _left(self) -> str:
        """Return `  left 3 min 20 s`, or nothing while the pace is not known."""
        seconds = self._left_s()
        return "" if seconds is None else f"  left {duration(seconds)}"

    def _where(self) -> str:
        """Name the step in progress."""
        if self._current is None:
            return self._run
        return f"step {self._current}/{self._total}" if self._current > 0 else "before training"

    def _doing(self) -> str:
        stage = self._stages.get(self._stage, StageTime())
        return f"{self._stage} {stage.done}/{stage.total}" if stage.total else self._stage

    def _sample(self, step: int) -> Mapping[str, Any] | None:
        """Return a response of the step. None: no sample is written."""
        return last_sample(self._folder, step) if self._folder is not None else None
