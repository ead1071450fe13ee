"""The live display of a run: bars of the step's stages, a table of the last steps, the last sample.

A separate thread redraws the display in place, on a terminal or in the cell of a notebook. Nothing waits for either.
`open_progress` chooses the display.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.tracking.display.progress import JsonProgress, LineProgress, Mode, Progress, StageTime
from rlhf.tracking.formatting import number
from rlhf.tracking.notebook import PLACE, Refresher, in_notebook

_TABLE_STEPS = 6  # newest steps in the table
_SAMPLE_CHARACTERS = 240  # of a prompt's end, and of a response
_BAR = 32


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
    """Return the display for `mode`. `auto` is live on a terminal and in a notebook, and plain lines elsewhere.

    `show` names the metrics to show, in this order. `folder` is the run folder, for samples; None: no samples. `stream`
    None: stdout for JSON, stderr otherwise.
    """
    kinds: dict[Mode, type[Progress]] = {"auto": LineProgress, "json": JsonProgress, "quiet": Progress}
    if stream is None and in_notebook():
        kinds["auto"] = CellProgress
    elif (stream or sys.stderr).isatty():
        kinds["auto"] = LiveProgress
    return kinds[mode](total_steps, done_steps, show, run, folder, stream)


class LiveProgress(Progress):
    """Steps and their time left, each stage of the step at work, the last steps' numbers, and a response."""

    def _start(self) -> None:
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=_TABLE_STEPS)
        self._evaluated: tuple[int, Mapping[str, float]] | None = None  # the last row with an evaluation
        self._last: Mapping[str, Any] | None = None
        self._open()

    def _open(self) -> None:
        self._console = Console(file=self._stream, stderr=self._stream is None)
        # A separate thread redraws the result of `get_renderable` at 4 Hz: calls never wait for the terminal.
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def _stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        row = (step, {key: metrics[key] for key in self._show if key in metrics})
        if row[1]:
            self._rows.append(row)
        if any(key.startswith("eval/") for key in row[1]):
            self._evaluated = row
        self._last = self._sample(step) or self._last

    def _render(self) -> Group:
        table = [self._table()] if self._rows else []
        sample = [] if self._last is None else [_sample_text(self._last)]
        return Group(self._bars(), *table, *sample)

    def _bars(self) -> Table:
        bars = Table.grid(padding=(0, 1))
        bars.add_column(min_width=12)  # so that nothing shifts as the stages change
        steps = f"{self._done}/{self._total}{self._left()}{self._waiting()}  {self._run}"
        bars.add_row(Text("steps"), _bar(self._done, self._total), Text(steps))
        for name, stage in list(self._stages.items()):
            done, total = (1, 1) if stage.since is None else (stage.done, stage.total)
            bars.add_row(Text(name), _bar(done, total), Text(_stage_text(stage)))
        return bars

    def _table(self) -> Table:
        rows = list(self._rows)
        if self._evaluated is not None and self._evaluated not in rows:
            rows.insert(0, self._evaluated)
        keys = [key for key in self._show if any(key in numbers for _, numbers in rows)]
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("step", justify="right")
        for key in keys:
            table.add_column(Text(key.replace("/", "/\n", 1), style="dim"), justify="right", vertical="bottom")
        for step, numbers in rows:
            table.add_row(str(step), *(number(numbers[key]) if key in numbers else "" for key in keys))
        return table


class CellProgress(LiveProgress):
    """The same display in the output of a notebook's cell."""

    def _open(self) -> None:
        PLACE.is_taken = True
        self._refresher = Refresher(self._update)

    def _update(self) -> None:
        shown = Table.grid()  # a notebook shows a table, and no group
        shown.add_row(self._render())
        PLACE.show(shown)

    def note(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def close(self) -> None:
        self._refresher.stop()
        PLACE.leave()


def _bar(done: int, total: int) -> ProgressBar:
    """Return a bar. A total of 0 (not counted) gives a moving bar."""
    return ProgressBar(total=total or 1, completed=done, width=_BAR, pulse=not total)


def _stage_text(stage: StageTime) -> str:
    seconds = stage.seconds + (0.0 if stage.since is None else time.monotonic() - stage.since)
    counted = f"{stage.done}/{stage.total}  " if stage.total else ""
    return f"{counted}{seconds:.1f} s"


def _sample_text(row: Mapping[str, Any]) -> Text:
    """Return the end of a prompt and the beginning of the response on two lines, as text without markup."""
    score = row.get("score")
    scored = "" if score is None else f" [{number(score)}]"
    prompt, response = str(row.get("prompt", "")), str(row.get("response", ""))
    sample = Text(no_wrap=False, overflow="fold")
    sample.append("sample  ", style="dim")
    sample.append(_printable_line(prompt[-_SAMPLE_CHARACTERS:]), style="dim")
    sample.append("\n     -> ", style="dim")
    sample.append(_printable_line(response[:_SAMPLE_CHARACTERS]) + scored)
    return sample


def _printable_line(text: str) -> str:
    return "".join(mark if mark.isprintable() else " " for mark in text)
