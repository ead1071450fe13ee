"""What the terminal shows of a run: bars, a step table and the last sample on a terminal, one plain line a step
elsewhere, or JSON lines.

Written to stderr by the driver, JSON lines to stdout. It shows numbers that others computed and decides nothing: a run
is the same without it.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from rlhf.tracking.samples import last_sample

if TYPE_CHECKING:
    from rlhf.tracking.findings import Finding

Mode = Literal["auto", "json", "quiet"]
_PACE_STEPS = 20  # steps over which the pace is taken
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
    """The display that is asked for; auto: the one that fits where stderr (or `stream`) goes.

    `done_steps`: steps that an earlier start has done. `show`: metrics to show, in this order, where a step has them.
    `run`: its name. `folder`: of the run, whose samples are shown; None: none are.
    """
    if mode == "quiet":
        return Progress(total_steps, done_steps, show)
    if mode == "json":
        from rlhf.tracking.progress_json import JsonProgress

        return JsonProgress(total_steps, done_steps, show, run, folder, sys.stdout if stream is None else stream)
    out = sys.stderr if stream is None else stream
    if out.isatty():
        from rlhf.tracking.progress_live import LiveProgress

        return LiveProgress(total_steps, done_steps, show, run, folder, stream)
    return LineProgress(total_steps, done_steps, show, run, out)


@dataclass(slots=True)
class StageTime:
    """One stage of the step at work."""

    done: int = 0
    total: int = 0  # 0: not counted
    seconds: float = 0.0  # until it was last left
    since: float | None = None  # when it was entered; None: another one is at work


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
        """Show what goes on now, and how far it is (`rollouts 37/64`); total 0: not counted."""
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
        """Record that a step is done. Step 0, the evaluation before training, does not count as one."""
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
        """Write a line that stays."""

    def finding(self, finding: Finding) -> None:
        """Show something that looks wrong, once. The log has it too."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shown(self, *, entered: bool) -> None:
        """The stage changed, or how far it is."""

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step ended; its stages are still known."""

    def _leave(self, now: float) -> None:
        stage = self._stages.get(self._stage)
        if stage is not None and stage.since is not None:
            stage.seconds += now - stage.since
            stage.since = None

    def _left_s(self) -> float | None:
        """Seconds left at the pace of the last steps."""
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
        """A response of the step; None if none is written."""
        return last_sample(self._folder, step) if self._folder is not None else None


class LineProgress(Progress):
    """A heading, one line a step, and within a long step one a minute."""

    def __init__(self, total_steps: int, done_steps: int, show: Sequence[str], run: str, stream: TextIO) -> None:
        super().__init__(total_steps, done_steps, show, run)
        self._stream = stream
        self._say(f"{run}: {total_steps} steps" + (f", of which {done_steps} are done" if done_steps else ""))

    def note(self, text: str) -> None:
        self._say(text)

    def _shown(self, *, entered: bool) -> None:
        if time.monotonic() - self._said >= _HEARTBEAT_S:
            self._say(f"{self._where()}: {self._doing()}")

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = "".join(f"  {key} {number(value)}" for key, value in self._numbers.items())
        where = f"step {step}/{self._total}" if step > 0 else "before training"
        self._say(f"{where}{numbers}{self._left()}")

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
        self._said = time.monotonic()


def number(value: float) -> str:
    """Three significant digits, whole numbers whole, and no exponent for thousands."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    whole = float(value).is_integer() or abs(value) >= 999.5  # three digits make a thousand of it
    return f"{value:.0f}" if whole and abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
