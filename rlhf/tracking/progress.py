"""What the terminal shows of a run: a live line of bars on a terminal, one plain line a step elsewhere.

Written to stderr by the driver. It shows numbers that others computed and decides nothing: a run is the same
without it.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PACE_STEPS = 20  # steps over which the pace is taken
_HEARTBEAT_S = 60.0  # between plain lines within one step


def open_progress(
    total_steps: int,
    *,
    done_steps: int = 0,
    show: Sequence[str] = (),
    quiet: bool = False,
    stream: TextIO | None = None,
) -> Progress:
    """The display that fits where stderr (or `stream`) goes.

    `done_steps`: steps that an earlier start has done. `show`: metrics to show, in this order, where a step has them.
    """
    out = sys.stderr if stream is None else stream
    if quiet:
        return Progress(total_steps, done_steps, show)
    if out.isatty():
        return LiveProgress(total_steps, done_steps, show, Console(file=stream, stderr=stream is None))
    return LineProgress(total_steps, done_steps, show, out)


class Progress:
    """The interface, and the quiet form of it: keeps count and shows nothing."""

    def __init__(self, total_steps: int, done_steps: int, show: Sequence[str]) -> None:
        self._total = total_steps
        self._done = done_steps
        self._show = tuple(show)
        self._ends = deque([time.monotonic()], maxlen=_PACE_STEPS + 1)
        self._stage = ("starting", 0, 0)
        self._numbers: dict[str, float] = {}

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        """What goes on now, and how far it is (`rollouts 37/64`); total 0: not counted."""
        self._stage = (name, done, total)
        self._shown()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done. Step 0, the evaluation before training, does not count as one."""
        self._numbers |= {key: metrics[key] for key in self._show if key in metrics}
        if step > 0:
            self._done = step
            self._ends.append(time.monotonic())
        else:
            self._ends[-1] = time.monotonic()
        self._stage = ("", 0, 0)
        self._stepped(step)

    def note(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shown(self) -> None:
        """The stage changed."""

    def _stepped(self, step: int) -> None:
        """A step ended."""

    def _left(self) -> str:
        """Time left at the pace of the last steps."""
        if len(self._ends) < 2:
            return "?"
        pace_s = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return duration(pace_s * (self._total - self._done))

    def _doing(self) -> str:
        name, done, total = self._stage
        return f"{name} {done}/{total}" if total else name


class LineProgress(Progress):
    """One line a step, and within a long step one a minute."""

    def __init__(self, total_steps: int, done_steps: int, show: Sequence[str], stream: TextIO) -> None:
        super().__init__(total_steps, done_steps, show)
        self._stream = stream
        self._said = time.monotonic()

    def note(self, text: str) -> None:
        self._say(text)

    def _shown(self) -> None:
        if time.monotonic() - self._said >= _HEARTBEAT_S:
            self._say(f"step {self._done + 1}/{self._total}: {self._doing()}")

    def _stepped(self, step: int) -> None:
        numbers = "".join(f"  {key} {number(value)}" for key, value in self._numbers.items())
        self._say(f"step {step}/{self._total}{numbers}  left {self._left()}")

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
        self._said = time.monotonic()


class LiveProgress(Progress):
    """Two bars (steps, current stage) with the newest numbers under them, redrawn in place."""

    def __init__(self, total_steps: int, done_steps: int, show: Sequence[str], console: Console) -> None:
        super().__init__(total_steps, done_steps, show)
        self._console = console
        # Redrawn by its own thread at 4 Hz from what `get_renderable` gives: calls never wait for the terminal.
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        name, done, total = self._stage
        bars = Table.grid(padding=(0, 1))
        bars.add_column(min_width=12)  # so that nothing shifts as the stages change
        bars.add_row(Text("steps"), _bar(self._done, self._total), f"{self._done}/{self._total}  left {self._left()}")
        bars.add_row(Text(name), _bar(done, total) if name else "", f"{done}/{total}" if total else "")
        numbers = Table.grid(padding=(0, 2))
        for key, value in self._numbers.items():
            numbers.add_row(Text(key, style="dim"), Text(number(value)))
        return Group(bars, numbers)


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=total or 1, completed=done, width=32, pulse=not total)


def number(value: float) -> str:
    """Three significant digits, whole numbers whole, and no exponent for thousands."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:.0f}" if whole and abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
